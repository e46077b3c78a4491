"""What the processes behind a target use: processor seconds, memory, and GPUs where there are."""

from __future__ import annotations

import importlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

_SAMPLE_S = 0.25
_TITLES = {"sglang::scheduler": "scheduler", "sglang::detokenizer": "detokenizer"}

Family = Mapping[str, tuple[psutil.Process, ...]]
"""Processes by what they do: controller, worker, server, scheduler, detokenizer."""


def role_below(process: psutil.Process) -> str:
    """What a process does that a worker has started."""
    name = (process.cmdline() or [""])[0].strip()
    return next((role for title, role in _TITLES.items() if name.startswith(title)), "server")


def family(addresses: Iterable[str]) -> Family:
    """The processes that listen at ``addresses`` on this machine, and those they have started.

    Empty where the target is elsewhere, or its processes are another user's.
    """
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    listening = _listening()
    for address in addresses:
        parts = urlsplit(address)
        pid = listening.get(parts.port or 80)
        if pid is None or parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            continue
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            found[_role(process)].append(process)
            for child in process.children(recursive=True):
                with suppress(psutil.Error):
                    found[role_below(child)].append(child)
    return {role: tuple(processes) for role, processes in found.items()}


def _listening() -> dict[int, int]:
    """Process by port."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return {}
    return {
        connection.laddr.port: connection.pid
        for connection in connections
        if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr
    }


def _role(process: psutil.Process) -> str:
    line = process.cmdline()
    module = line[line.index("-m") + 1] if "-m" in line[:-1] else ""
    return {"controller": "controller"}.get(module, "worker" if "workers" in module else "server")


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The arguments without the values of flags that hold a secret."""
    shown = []
    hide = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        secret = name.startswith("-") and any(
            word in name.lower() for word in ("key", "secret", "password")
        )
        if secret and equals:
            argument = f"{name}=..."
        shown.append("..." if hide else argument)
        hide = secret and not equals
    return shown


def command_lines(found: Family) -> dict[str, list[str]]:
    """How each was started, by role."""
    lines: dict[str, list[str]] = {}
    for role, processes in found.items():
        for process in processes:
            with suppress(psutil.Error, ValueError):
                program, *arguments = process.cmdline()
                line = " ".join([Path(program).name, *without_secrets(arguments)])
                lines.setdefault(role, []).append(line.strip()[:500])
    return lines


def cpu_s(found: Family) -> dict[str, float]:
    """Processor seconds so far, by role."""
    return {role: sum(map(_cpu_s, processes)) for role, processes in found.items()}


def _cpu_s(process: psutil.Process) -> float:
    """All threads, to the nanosecond where the kernel says it; else in its clock ticks."""
    try:
        threads = list(Path(f"/proc/{process.pid}/task").iterdir())
        total = 0
        for thread in threads:
            with suppress(OSError):  # it has just ended
                total += int((thread / "schedstat").read_text().split()[0])
        return total / 1e9
    except (OSError, ValueError):
        with suppress(psutil.Error):
            times = process.cpu_times()
            return float(times.user + times.system)
        return 0.0


def rss_bytes(found: Family) -> dict[str, int]:
    """Resident memory now, by role."""
    total: dict[str, int] = {}
    for role, processes in found.items():
        for process in processes:
            with suppress(psutil.Error):
                total[role] = total.get(role, 0) + process.memory_info().rss
    return total


class Gpus:
    """The GPUs of this machine; none where there is no driver."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        try:
            self._nvml: Any = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except Exception:  # noqa: BLE001  # NVML's errors have no base we could name without it
            self._handles = []

    def names(self) -> list[str]:
        return [str(self._nvml.nvmlDeviceGetName(handle)) for handle in self._handles]

    def now(self) -> list[tuple[float, int]]:
        """Busy share and bytes in use of each."""
        found = []
        for handle in self._handles:
            busy = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            found.append((busy, int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)))
        return found


class Watch:
    """Measures what ``found`` use while its block runs; ``figures`` has it afterwards."""

    def __init__(self, found: Family, gpus: Gpus) -> None:
        self._found = found
        self._gpus = gpus
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._rss: dict[str, int] = {}
        self._busy: list[list[float]] = []
        self._gpu_bytes: list[list[int]] = []
        self.figures: dict[str, Any] = {}

    def __enter__(self) -> Watch:
        self._before = cpu_s(self._found)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        after = cpu_s(self._found)
        self.figures = {
            "cpu_s": {role: after[role] - self._before[role] for role in after},
            "rss_bytes": dict(self._rss),
        }
        if self._busy:
            self.figures["gpu"] = {
                str(index): {"busy": sum(busy) / len(busy), "bytes": max(used)}
                for index, (busy, used) in enumerate(
                    zip(
                        zip(*self._busy, strict=True),
                        zip(*self._gpu_bytes, strict=True),
                        strict=True,
                    )
                )
            }

    def _sample(self) -> None:
        while True:
            for role, used in rss_bytes(self._found).items():
                self._rss[role] = max(self._rss.get(role, 0), used)
            if now := self._gpus.now():
                self._busy.append([busy for busy, _ in now])
                self._gpu_bytes.append([used for _, used in now])
            if self._stop.wait(_SAMPLE_S):
                return
