"""LLaVA checkpoints in their original format (``liuhaotian/...``), through a view of them.

``workers.sglang.original`` writes the view: transformers' configuration, with ``original`` in it,
and links to the weights. What the format has of its own is read by the code of ``workers.llava``,
which serves the Hugging Face worker as well, so that both compute the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from protocol.errors import EngineFailed
from workers import files
from workers.llava import config as original_config
from workers.llava import weights as original_weights
from workers.sglang.server.models.llava_hf import LlavaForConditionalGeneration
from workers.sglang.server.models.llava_next_hf import LlavaNextForConditionalGeneration


class LlavaOriginalForConditionalGeneration(LlavaNextForConditionalGeneration):
    """The name that a view gives its architecture; with tiles as LLaVA-NeXT, or without."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        self._original = config.original
        self._settings = settings_of(config.original)
        if not original_weights.is_stock(self._settings.projector):
            with _told():
                self.multi_modal_projector = original_weights.build_projector(
                    self._settings.projector,
                    config.vision_config.hidden_size,
                    config.text_config.hidden_size,
                )
        if not self._settings.resolutions:
            del self.image_newline

    def embed_picture(self, item):
        if self._settings.resolutions:
            return super().embed_picture(item)
        return LlavaForConditionalGeneration.embed_picture(self, item)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]):
        text = _language_names(self.config.text_config)
        places = text | {f"model.{name}" for name, _ in self.named_parameters()}
        tied = {"lm_head.weight"} if self.config.text_config.tie_word_embeddings else set()
        pending = original_weights.Pending(text - tied, set())
        with _told():
            super().load_weights(self._placed(weights, places, pending))
            pending.check(self._original["folder"])

    def _placed(self, weights, places, pending) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of ``weights`` that have a place, by the names of transformers."""
        patterns = original_weights.renames(self._settings.projector)
        for original_name, weight in weights:
            name = original_weights.new_name(original_name, patterns)
            if name.startswith(VISION_TOWER) and not self._original["tower_trained"]:
                continue  # LLaVA takes the tower's own
            pending.missing.discard(name)
            if name in places:
                yield name, weight
            else:
                pending.strange.add(name)
        if not self._original["tower_trained"]:
            yield from original_weights.of_tower(Path(self._original["tower"])).items()


VISION_TOWER = "model.vision_tower."


def settings_of(original):
    """What the checkpoint's own configuration says."""
    file = Path(original["folder"]) / "config.json"
    return original_config.parse(files.read_json(file))


def _language_names(config) -> set[str]:
    """The weights of the language model, as transformers has them; SGLang misses none."""
    with torch.device("meta"):
        names = set(AutoModelForCausalLM.from_config(config).state_dict())
    patterns = original_weights.renames("")
    return {original_weights.new_name(name, patterns) for name in names}


@contextmanager
def _told():
    """Let the worker find the sentence in the log: it looks for the name of an error."""
    try:
        yield
    except EngineFailed as exc:
        raise ValueError(f"{exc.message} {exc.remedy}") from exc


EntryClass = [LlavaOriginalForConditionalGeneration]
