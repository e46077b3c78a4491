"""Weights of LLaVA's original format under the names of transformers' modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel

from protocol.errors import EngineFailed
from workers import files

Weights = dict[str, torch.Tensor]

PROJECTOR = "model.mm_projector."
"""How the names of the projector's weights begin in the original format."""

# Buffers that older versions saved, and the end of a row of tiles where there are no tiles.
UNUSED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$|^model\.image_newline$")


def renames(projector: str) -> dict[str, str]:
    """Patterns and what replaces them, for ``from_pretrained(key_mapping=...)``."""
    stock = {
        r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
        r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    }
    own = {r"^model\.mm_projector\.": "model.multi_modal_projector."}
    return {
        **(stock if is_stock(projector) else own),
        r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
        r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    }


def renamed(weights: Mapping[str, torch.Tensor], patterns: Mapping[str, str]) -> Weights:
    """``weights`` under their new names."""
    return {new_name(name, patterns): weight for name, weight in weights.items()}


def new_name(name: str, patterns: Mapping[str, str]) -> str:
    """``name`` as the first of ``patterns`` that fits it has it."""
    for pattern, new in patterns.items():
        name, changed = re.subn(pattern, new, name)
        if changed:
            break
    return name


def is_stock(projector: str) -> bool:
    """Whether transformers' own class is this projector."""
    return projector == "mlp2x_gelu"


def build_projector(kind: str, vision_size: int, text_size: int) -> nn.Module:
    """A projector [..., vision_size] to [..., text_size], its weights named as the original's.

    Raises:
        EngineFailed: it is the identity and the sizes differ.
    """
    if kind == "identity":
        if vision_size != text_size:
            raise EngineFailed(
                f"The projector is the identity, but features of {vision_size} cannot stand "
                f"among embeddings of {text_size}.",
                remedy="Correct mm_projector_type or mm_vision_tower in config.json.",
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(vision_size, text_size)
    layers: list[nn.Module] = [nn.Linear(vision_size, text_size)]
    for _ in range(1, int(kind.removeprefix("mlp").removesuffix("x_gelu"))):
        layers += [nn.GELU(), nn.Linear(text_size, text_size)]
    return nn.Sequential(*layers)


def of_tower(tower: Path) -> Weights:
    """The weights of CLIP's vision half, named as the network's.

    Raises:
        EngineFailed: one is missing.
    """
    if not files.weight_files(tower):
        raise EngineFailed(
            f"The vision tower {tower} holds no weights.", remedy="Download it again, complete."
        )
    network, report = CLIPVisionModel.from_pretrained(
        tower, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
    )
    pending = Pending.of(report)
    pending.strange.clear()  # the half for text
    pending.check(tower)
    return {f"model.vision_tower.{name}": weight for name, weight in network.state_dict().items()}


def without_prefixes(weights: Mapping[str, torch.Tensor]) -> Weights:
    """``weights`` of ``non_lora_trainables.bin`` by the names they have in a whole checkpoint."""
    names = {name: name.removeprefix("base_model.") for name in weights}
    if any(name.startswith("model.model.") for name in names.values()):
        names = {old: name.removeprefix("model.") for old, name in names.items()}
    return {names[name]: weight for name, weight in weights.items()}


@dataclass(slots=True)
class Pending:
    """What ``from_pretrained`` left open: weights without a value, and values without a place."""

    missing: set[str]
    strange: set[str]

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Pending:
        """From its loading info."""
        mismatched = {name for name, *_ in report["mismatched_keys"]}
        return cls({*report["missing_keys"], *mismatched}, set(report["unexpected_keys"]))

    def exchange(self, path: str, module: nn.Module) -> None:
        """Count with ``module`` at ``path`` in place of the one there, and with no value for it."""
        inside = f"{path}."
        self.missing = {name for name in self.missing if not name.startswith(inside)}
        self.strange = {name for name in self.strange if not name.startswith(inside)}
        self.missing |= {f"{inside}{name}" for name, _ in module.named_parameters()}

    def put(self, network: Any, weights: Mapping[str, torch.Tensor], source: object) -> None:
        """Copy ``weights``, named as those of ``network``, into its own.

        Raises:
            EngineFailed: it has none of that name, or one of another shape.
        """
        own = dict(network.named_parameters(remove_duplicate=False))
        for name, weight in weights.items():
            if name in own and own[name].shape == weight.shape:
                own[name].data.copy_(weight)
            elif name in own or not UNUSED.search(name):
                has = f"{tuple(own[name].shape)}" if name in own else "nothing"
                raise EngineFailed(
                    f"{source} holds {name} of shape {tuple(weight.shape)}; the model of its "
                    f"config.json has {has} there.",
                    remedy="Give the base it was trained on, and its own config.json.",
                )
        self.missing.difference_update(weights)

    def check(self, source: object) -> None:
        """Make sure that nothing is left.

        Raises:
            EngineFailed: a weight of the network is missing, or one of ``source`` has no place.
        """
        strange = {name for name in self.strange if not UNUSED.search(name)}
        if self.missing:
            raise EngineFailed(
                f"The checkpoint {source} lacks {len(self.missing)} of its weights or has them in "
                f"another shape than its config says, {min(self.missing)} for one.",
                remedy="Download or export it again, complete.",
            )
        if strange:
            raise EngineFailed(
                f"The checkpoint {source} holds {len(strange)} weights that the model of its "
                f"config does not have, {min(strange)} for one.",
                remedy="Give it the config.json it was trained with.",
            )
