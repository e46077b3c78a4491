"""Reading a LoRA adapter: which layers of a network it changes, and how.

Files are PEFT's, of any generation, with LLaVA's ``non_lora_trainables.bin`` beside them if there
is one. PEFT is not asked: it would put layers of its own into the network, and fill what a file
lacks with random numbers.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from protocol.errors import EngineFailed
from workers.adapters.changes import Change, LowRank, Whole, features
from workers.adapters.config import SERVE_MERGED, WEIGHTS, config_of
from workers.adapters.layer_names import LayerNames
from workers.files import ADAPTER, one_line, read_weights

log = logging.getLogger(__name__)

LLAVA_WEIGHTS = "non_lora_trainables.bin"
"""What LLaVA's training changed beside the adapter's layers: the projector, as a rule."""

_ROUNDING = 2**-8
"""The step of bfloat16: weights that differ by less are the same, saved in another precision."""

_LOW_RANK = ("lora_A.weight", "lora_B.weight", "lora_B.bias")

_KEY = re.compile(r"(?P<layer>.+?)\.(?:(?P<part>lora_[AB])(?:\.\w+)?\.)?(?P<kind>weight|bias)")


def read(network: Any, path: str) -> dict[str, Change]:
    """What the adapter at ``path``, a directory or a hub id, changes: by name of the layer.

    The tensors are float32 on the CPU.

    Raises:
        EngineFailed: it is not there, it is broken, it does not fit ``network``, or it is of a
            type that requests cannot choose one by one.
    """
    directory, config = config_of(path)
    try:
        fitting = _Fitting(network, path, config)
        weights = read_weights(_weights_file(directory))
        if (directory / LLAVA_WEIGHTS).is_file():
            weights |= fitting.lacking(read_weights(directory / LLAVA_WEIGHTS))
        return fitting.changes(weights)
    except EngineFailed:
        raise
    except Exception as exc:
        log.debug("the adapter cannot be read", exc_info=True)
        raise EngineFailed(
            f"The adapter {path} cannot be read: {one_line(exc)}.",
            remedy=f"Give a directory with PEFT's {ADAPTER} and {WEIGHTS[0]}, complete.",
        ) from exc


def _weights_file(directory: Path) -> Path:
    safe, pickled = (directory / name for name in WEIGHTS)
    return pickled if pickled.is_file() and not safe.is_file() else safe


class _Fitting:
    """One adapter held against one network."""

    def __init__(self, network: Any, path: str, config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = config
        self._names = LayerNames(network)
        self._modules = self._names.modules
        self._filed: dict[str, str] = {}  # the file's names of the network's layers

    def lacking(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of ``weights`` that are not the network's own already.

        A loader of LLaVA's format has put them there when the adapter is the model itself.
        """
        return {key: tensor for key, tensor in weights.items() if not self._has(key, tensor)}

    def _has(self, key: str, tensor: Tensor) -> bool:
        layer, _, part = key.rpartition(".")
        own = getattr(self._modules.get(self._names.find(_plain(layer)) or ""), part, None)
        if not isinstance(own, Tensor) or own.shape != tensor.shape:
            return False
        if own.is_meta:  # a network without weights: it is taken for the one that was adapted
            return True
        own, tensor = own.detach().cpu().float(), tensor.float()
        return torch.allclose(own, tensor, rtol=_ROUNDING, atol=0)

    def changes(self, weights: Mapping[str, Tensor]) -> dict[str, Change]:
        """By name of the layer."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights.items():
            # PEFT saves the head or the embedding of the base, too, when it is adapted.
            own = key.replace(".base_layer.", ".")
            if own != key:
                if not self._has(own, tensor):
                    raise self._misfit(f"it was trained over another {_plain(own)}")
                continue
            match = _KEY.fullmatch(key)
            if match is None:
                raise self._misfit(f"{key} is nothing that can be changed", SERVE_MERGED)
            layer = self._layer(_plain(match["layer"]))
            part = f"{match['part'] or 'own'}.{match['kind']}"
            parts.setdefault(layer, {})[part] = tensor.float()
        changes = {layer: self._change(layer, tensors) for layer, tensors in parts.items()}
        self._check_complete(changes)
        return changes

    def _layer(self, name: str) -> str:
        """The network's name for the layer that the file calls ``name``."""
        found = self._names.find(name)
        if found is None:
            raise self._misfit(f"there is no layer {name} in it")
        module = self._modules[found]
        # Its weights are used by the layer around it, which does not call it.
        uncalled = isinstance(module, NonDynamicallyQuantizableLinear)
        # Experts get tokens of several requests in one, by which rows cannot be told.
        if uncalled or re.search(r"\bexperts\.\d", found) or features(module) is None:
            raise self._misfit(f"{found} is no plain linear layer", SERVE_MERGED)
        self._filed[found] = name
        return found

    def _change(self, layer: str, tensors: Mapping[str, Tensor]) -> Change:
        module = self._modules[layer]
        inputs, outputs = features(module) or (0, 0)
        names = set(tensors)
        change: Change
        shapes: list[tuple[int, ...]]
        if {"lora_A.weight", "lora_B.weight"} <= names <= set(_LOW_RANK):
            rank = int(self._by_pattern("rank_pattern", layer, self._config["r"]))
            alpha = float(self._by_pattern("alpha_pattern", layer, self._config["lora_alpha"]))
            scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
            down, up, bias = (tensors.get(name) for name in _LOW_RANK)
            assert down is not None
            assert up is not None
            change = LowRank(down, up * scale, None if bias is None else bias * scale)
            shapes = [(rank, inputs), (outputs, rank), (outputs,)]
            found = [down, up, bias]
        elif names == ({"own.weight"} if module.bias is None else {"own.weight", "own.bias"}):
            change = Whole(tensors["own.weight"], tensors.get("own.bias"))
            shapes = [(outputs, inputs), (outputs,)]
            found = [change.weight, change.bias]
        else:
            raise self._misfit(f"of {layer} it has {' and '.join(sorted(names))} alone")
        for tensor, shape in zip(found, shapes, strict=True):
            if tensor is not None and tensor.shape != shape:
                raise self._misfit(
                    f"for {layer} it has a matrix of {tuple(tensor.shape)}, not of {shape}"
                )
        return change

    def _by_pattern(self, field: str, layer: str, default: Any) -> Any:
        patterns: Mapping[str, Any] = self._config.get(field) or {}
        for pattern, value in patterns.items():
            for name in (layer, self._filed[layer]):
                if re.fullmatch(rf"(.*\.)?({pattern})", name):
                    return value
        return default

    def _check_complete(self, changes: Mapping[str, Change]) -> None:
        """Raise when layers are missing from the file: it is cut off, or its base was another.

        What the config names must be there, and a part of one layer in every layer of its stack;
        but patterns that choose single layers are not followed.
        """
        config = self._config
        targets = config.get("target_modules") or ()
        given = {name for name, change in changes.items() if isinstance(change, LowRank)}
        if not given:
            raise self._misfit("it changes no layer")
        named = [] if isinstance(targets, str) else [*targets]
        known = given | {self._filed[layer] for layer in given}
        whole = changes.keys() - given
        missing = [name for name in named if not any(_ends(layer, name) for layer in known)]
        missing += [
            name
            for name in config.get("modules_to_save") or ()
            if not any(f".{name}." in f".{layer}." for layer in whole)
        ]
        choices = (targets, config.get("exclude_modules"), config.get("layers_to_transform"))
        if not re.search(r"(?<!\w)\d", str(choices)):
            stacks = {_stack(layer) for layer in given}
            missing += [
                name
                for name, module in self._modules.items()
                if _stack(name) in stacks and name not in given and features(module) is not None
            ]
        if missing:
            raise self._misfit(f"it has nothing for {missing[0]}")

    def _misfit(self, reason: str, remedy: str | None = None) -> EngineFailed:
        base = self._config.get("base_model_name_or_path") or "another model"
        return EngineFailed(
            f"The adapter {self._path} does not fit this model: {reason}.",
            remedy=remedy or f"It was made for {base}; load it over that, from a complete copy.",
        )


def _plain(name: str) -> str:
    """``name`` without what PEFT, or LLaVA, puts around a network."""
    return name.removeprefix("base_model.model.").removeprefix("base_model.")


def _stack(layer: str) -> str:
    """``layer`` with numbers taken out: the same for the same part of every layer of a stack."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", layer)


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
