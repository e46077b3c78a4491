"""Which attention the networks compute with: PyTorch's own, or a flash-attn of this GPU's kind."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

from protocol.errors import EngineFailed

SDPA = "sdpa"

# The best first for each major compute capability. 3 is written for Hopper (9); 4 is for Hopper
# and later, and still a beta that compiles itself at run time; 2 runs from Ampere (8) on.
_BEFORE_HOPPER = ("flash_attention_2",)
_HOPPER = ("flash_attention_3", "flash_attention_4", "flash_attention_2")
_LATER = ("flash_attention_4", "flash_attention_2")


def choose(use_flash_attn: bool, device: torch.device, dtype: Any = None) -> str:
    """The ``attn_implementation`` for a network on ``device`` with weights of ``dtype``.

    Raises:
        EngineFailed: flash-attn is wanted, and this device, this precision or this environment
            has none.
    """
    if not use_flash_attn:
        return SDPA
    # Asked, not imported: with flash-attn-4 alone, "import flash_attn" succeeds, too.
    found = {
        "flash_attention_2": is_flash_attn_2_available(),
        "flash_attention_3": is_flash_attn_3_available(),
        "flash_attention_4": is_flash_attn_4_available(),
    }
    installed = {name for name, available in found.items() if available}
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return best(device.type, capability, installed, dtype)


def best(
    device_type: str,
    capability: tuple[int, int] | None,
    installed: Collection[str],
    dtype: Any = None,
) -> str:
    """The fastest of the ``installed`` flash-attn that runs on such a device.

    Raises:
        EngineFailed: none does.
    """
    if device_type != "cuda" or capability is None:
        raise EngineFailed(
            f"--use-flash-attn needs an NVIDIA GPU; this worker runs on {device_type}.",
            remedy="Leave it out: PyTorch's own attention is used then.",
        )
    major, minor = capability
    if major < 8:
        raise EngineFailed(
            "--use-flash-attn needs a GPU of compute capability 8.0 (Ampere) or later; this one "
            f"has {major}.{minor}.",
            remedy="Leave it out: PyTorch's own attention is used then.",
        )
    if dtype is torch.float32:
        raise EngineFailed(
            "--use-flash-attn computes in float16 or bfloat16, not in float32.",
            remedy="Leave --use-flash-attn or --dtype float32 out.",
        )
    for name in _BEFORE_HOPPER if major == 8 else _HOPPER if major == 9 else _LATER:
        if name in installed:
            return name
    # flash-attn 2 asks torch how to build itself: no isolation, so its tools must be there before.
    remedy = (
        "pip install 'flash-attn-4>=4.0.0b18'"
        if major >= 9
        else "pip install 'setuptools>=77' wheel ninja && "
        "pip install --no-build-isolation '.[flash-attn]' (compiles for long; needs nvcc)"
    )
    raise EngineFailed(
        "--use-flash-attn finds nothing installed that runs on this GPU, whose compute capability "
        f"is {major}.{minor}.",
        remedy=f"Leave it out, or in Tandem's folder and environment: {remedy}.",
    )
