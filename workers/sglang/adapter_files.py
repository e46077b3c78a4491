"""A LoRA adapter written anew in the one form in which SGLang computes what PEFT does.

SGLang reads an ``r`` and a ``lora_alpha`` and takes every layer to have them, tells layers apart by
a number in their names, those of a vision tower too, and wants the parts of a layer that it has
fused together. Here the adapter is read as the Hugging Face worker reads it, held against the same
network, and its scales, ranks and names are made plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from protocol.errors import EngineFailed
from workers.adapters.changes import LowRank, features
from workers.adapters.config import WEIGHTS, fetch
from workers.adapters.files import LLAVA_WEIGHTS, read
from workers.files import ADAPTER
from workers.sglang.targets import FUSED, TARGETS

_LAYER = re.compile(
    r"model\.(?:language_model\.)?"
    rf"(?P<name>layers\.\d+\.(?:self_attn|mlp)\.)(?P<part>{'|'.join(TARGETS)})"
)


def skeleton(model: Any, *, trust_remote_code: bool) -> Any:
    """A network without weights, its layers' names and shapes alone.

    ``model`` is its configuration, or where a checkpoint is: a directory or a hub id.
    """
    config = model
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    factory = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        return factory.from_config(config, trust_remote_code=trust_remote_code)


def rewrite(network: Any, path: str, folder: str) -> int:
    """Write the adapter at ``path``, a directory or a hub id, over ``network`` into ``folder``.

    ``folder`` is there, and empty.

    Returns:
        Its rank: the largest of its layers, which all have it now.

    Raises:
        EngineFailed: it cannot be read, does not fit, or changes what SGLang does not adapt.
    """
    if (Path(fetch(path)) / LLAVA_WEIGHTS).is_file():
        raise _elsewhere(path, f"what {LLAVA_WEIGHTS} holds")
    layers: dict[str, LowRank] = {}
    for name, change in read(network, path).items():
        match = _LAYER.fullmatch(name)
        if match is None or not isinstance(change, LowRank) or change.bias is not None:
            raise _elsewhere(path, name)
        layers[match["name"] + match["part"]] = change
    rank = max(change.down.shape[0] for change in layers.values())
    shapes = {
        match["name"] + match["part"]: features(module) or (0, 0)
        for name, module in network.named_modules()
        if (match := _LAYER.fullmatch(name)) is not None
    }
    save_file(_tensors(layers, shapes, rank), Path(folder, WEIGHTS[0]))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": _parts(layers)}
    Path(folder, ADAPTER).write_text(json.dumps(config))
    return rank


def _tensors(
    layers: Mapping[str, LowRank], shapes: Mapping[str, tuple[int, int]], rank: int
) -> dict[str, Tensor]:
    """The matrices of ``layers`` and of those fused with them, by PEFT's names, of one rank."""
    tensors = {}
    for name in sorted({other for layer in layers for other in _fused(layer)}):
        inputs, outputs = shapes[name]
        down, up = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
        if name in layers:
            own = layers[name].down.shape[0]
            down[:own], up[:, :own] = layers[name].down, layers[name].up
        tensors[f"base_model.model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.model.{name}.lora_B.weight"] = up
    return tensors


def _fused(layer: str) -> list[str]:
    """``layer`` and those that are one with it in SGLang."""
    stem, _, part = layer.rpartition(".")
    group = next((group for group in FUSED if part in group), (part,))
    return [f"{stem}.{other}" for other in group]


def _parts(layers: Mapping[str, LowRank]) -> list[str]:
    return sorted({other.rpartition(".")[2] for layer in layers for other in _fused(layer)})


def _elsewhere(path: str, what: str) -> EngineFailed:
    return EngineFailed(
        f"The adapter {path} changes {what}; with SGLang an adapter is LoRA on the weights of a "
        f"language model's {', '.join(TARGETS[:-1])} and {TARGETS[-1]}.",
        remedy="Serve it with workers.hf, or merge it into its base with PEFT.",
    )
