"""What an adapter does to one linear layer: to its output, or for good to its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class LowRank:
    """Something added to a layer's output: ``x @ down.T @ up.T + bias``."""

    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank], the adapter's scale included
    bias: Tensor | None = None  # [outputs]

    def output(self, x: Tensor, base: Tensor) -> Tensor:
        """The adapted output for inputs ``x`` [..., inputs] and ``base`` [..., outputs]."""
        low = functional.linear(x.to(self.down.dtype), self.down)
        return base + functional.linear(low, self.up, self.bias).to(base.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return LowRank(self.down.to(device, dtype), self.up.to(device, dtype), bias)

    def merge(self, module: Any) -> None:
        """Add this to the weights of ``module``, which are plain numbers."""
        # In float32, because a step of bfloat16 is larger than many a change.
        weight = _weight(module).float() + (self.up @ self.down).to(module.weight.device)
        bias = self.bias
        if bias is not None and module.bias is not None:
            bias = module.bias.float() + bias.to(module.bias.device)
        _set(module, weight, bias)


@dataclass(frozen=True, slots=True)
class Whole:
    """Weights that take the place of a layer's own."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None = None  # [outputs]

    def output(self, x: Tensor, base: Tensor) -> Tensor:
        """The adapted output for inputs ``x`` [..., inputs]; ``base`` gives its precision."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(base.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Whole:
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return Whole(self.weight.to(device, dtype), bias)

    def merge(self, module: Any) -> None:
        """Put this into the place of the weights of ``module``."""
        _set(module, self.weight, self.bias)


Change = LowRank | Whole


def features(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantized or not; ``None`` for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _weight(module: Any) -> Tensor:
    """The matrix of a linear layer [outputs, inputs]."""
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def _set(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    _weight(module).copy_(weight)
    if bias is not None:
        bias = bias.to(module.weight.device, module.weight.dtype)
        module.bias = nn.Parameter(bias, requires_grad=False)
