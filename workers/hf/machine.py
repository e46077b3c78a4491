"""The machine: device, precision, threads and memory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import psutil
import torch

from protocol.errors import EngineFailed
from workers.files import one_line


def device_of(name: str) -> torch.device:
    """The device of this ``name``; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        EngineFailed: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        raise EngineFailed(
            f"The device {name!r} cannot be used: {one_line(exc)}.",
            remedy="Give --device cpu, or install the driver and the torch build it needs.",
        ) from exc
    return device


def dtype_of(name: str, device: torch.device) -> Any:
    """The precision of this ``name``, a torch dtype or transformers' ``auto``: the checkpoint's."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return "auto"
    # Emulated, bfloat16 is several times slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def limit_threads() -> None:
    """Use no more threads than this container may: torch counts the machine's cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = float(torch.get_num_threads())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        pass
    torch.set_num_threads(max(1, math.ceil(cores)))


def chunk_tokens(device: torch.device) -> int:
    """In a piece of a prompt. A constant, as cutting elsewhere rounds otherwise: the same request
    gives the same tokens on machines of one kind."""
    return 64 if device.type == "cpu" else 512


def spare_bytes(device: torch.device) -> int | None:
    """Memory the keys and values of all answers may take; ``None``: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    if device.type != "cpu":
        return None
    available = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        words = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        # The files just read, the checkpoint above all, are given up when memory is needed.
        used -= counts["inactive_file"] + counts["active_file"]
        available = min(available, limit - used)
    except (OSError, ValueError, KeyError):  # no cgroup, or "max": no limit
        pass
    return max(available, 0) // 2
