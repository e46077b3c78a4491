"""Figures and where they were taken."""

from __future__ import annotations

import datetime
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench.processes import ROOT
from protocol.messages import WorkerStatus


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of ``values``.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values")
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def quantile(values: Sequence[float], share: float) -> float:
    """The least of ``values`` that ``share`` of them do not exceed (nearest rank).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def rounded(value: Any, digits: int = 4) -> Any:
    """``value`` with its floats to ``digits`` significant digits, however deep they lie."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def machine() -> dict[str, Any]:
    """What computes here."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@cache
def commit() -> str:
    """The checkout as it was when this was called first."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


Keep = Callable[[dict[str, Any]], None]
"""Takes a line of results as soon as there is one: what follows may fail or be stopped."""


def _module() -> str:
    """What was started: ``python -m`` keeps its name in the path of its ``__main__``."""
    return ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts[:-1])


def record(kind: str, status: WorkerStatus, figures: dict[str, Any]) -> dict[str, Any]:
    """One line of results; ``status`` is of a worker that was measured."""
    return {
        "kind": kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine() | {"device": status.device, **status.versions},
        "model": status.model_names[0],
        **rounded(figures),
    }
