"""Let SGLang compute LoRA adapters where there is no CUDA driver.

Its code for adapters pins memory whatever the device, which PyTorch refuses without a driver. A
pinned tensor has the values of any other; only copies of it to a GPU are faster. And its backend
for the CPU goes through all its layers also where no request of a batch has an adapter, as a
recorded CUDA graph must; there is none here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from workers.sglang.server import imports

MODULES = frozenset({"sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend"})
"""Those that pin, with the LoRA backend that runs on a CPU."""

FACTORIES = frozenset({"empty", "ones", "tensor", "zeros"})
"""What of torch they give ``pin_memory``."""


def install() -> None:
    """See to it that ``MODULES`` run here; before SGLang is imported."""
    for name in MODULES:
        imports.after(name, adapt)


def adapt(module: ModuleType) -> None:
    """Have ``module`` pin nothing and skip what nobody asks for, unless there is a driver."""
    import torch

    if torch.cuda.is_available():
        return
    module.torch = _Unpinned()  # type: ignore[attr-defined]
    torch.Tensor.pin_memory = _itself  # raises always otherwise
    if hasattr(module, "TorchNativeLoRABackend"):
        module.TorchNativeLoRABackend.skip_inactive_dense_lora = True


class _Unpinned(ModuleType):
    """``torch`` as seen by one module."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        import torch

        found = getattr(torch, name)
        return _without_pinning(found) if name in FACTORIES else found


def _without_pinning(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, pin_memory: bool = False, **how: Any) -> Any:
        return factory(*args, **how)

    return make


def _itself(tensor: Any, *_args: Any, **_how: Any) -> Any:
    return tensor
