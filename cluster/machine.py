"""Questions to this machine: is there a GPU, which ports are free, is that process still ours."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Collection
from pathlib import Path

import psutil

from transport.process import free_port as any_free_port

START_TIME_TOLERANCE_S = 2.0
"""psutil derives start times from the boot time, which moves when the clock is set."""


def gpu_present() -> bool:
    """Whether an NVIDIA GPU can be used from here, without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if Path("/dev/nvidia0").exists():
        return True
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return False
    try:
        listed = subprocess.run([nvidia_smi, "-L"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU " in listed.stdout


def installed(module: str) -> bool:
    """Whether ``module`` could be imported here."""
    return importlib.util.find_spec(module) is not None


def free_port(host: str, *, besides: Collection[int | None] = ()) -> int:
    """A port of ``host`` that is free now, and none of ``besides``.

    Raises:
        OSError: ``host`` is no address of this machine.
    """
    while True:
        port = any_free_port(host)
        if port not in besides:
            return port


def check_port(host: str, port: int) -> None:
    """Return when ``port`` can be listened on.

    Raises:
        OSError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        # As the servers do: connections of an earlier process that linger must not count.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))


def start_time(pid: int) -> float | None:
    """When the process started (seconds since the epoch); ``None`` when there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def is_same_process(pid: int, started_at: float) -> bool:
    """Whether ``pid`` is still the process that started then, and no stranger with its number."""
    now = start_time(pid)
    return now is not None and abs(now - started_at) <= START_TIME_TOLERANCE_S
