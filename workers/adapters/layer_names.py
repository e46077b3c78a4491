"""The names of a network's layers, in the words of every generation of checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

_ORIGINAL_LLAVA = (
    (r"^model\.mm_projector\.0$", "model.multi_modal_projector.linear_1"),
    (r"^model\.mm_projector\.2$", "model.multi_modal_projector.linear_2"),
    (r"^model\.mm_projector(?=$|\.)", "model.multi_modal_projector"),
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.(layers|embed_tokens|norm)(?=$|\.)", r"model.language_model.\1"),
)


class LayerNames:
    """The layers of ``network``, found by transformers' names, old or new, or by LLaVA's."""

    def __init__(self, network: Any) -> None:
        self.modules: dict[str, Any] = dict(network.named_modules())
        self._prefix = network.base_model_prefix
        self._renamings = [
            step
            for step in get_model_conversion_mapping(network)
            if isinstance(step, WeightRenaming)
        ]

    def find(self, name: str) -> str | None:
        """The network's own name for the layer ``name``; ``None`` if it has no such layer."""
        return next((found for found in self._candidates(name) if found in self.modules), None)

    def _candidates(self, name: str) -> Iterable[str]:
        yield name
        # As transformers itself renames what older checkpoints of this architecture hold.
        yield rename_source_key(name, self._renamings, [], self._prefix, self.modules)[0]
        # LLaVA saves its projector with one model around it or with two.
        name = re.sub(r"^model\.model\.", "model.", name)
        for pattern, replacement in _ORIGINAL_LLAVA:
            if re.search(pattern, name):
                yield re.sub(pattern, replacement, name)
