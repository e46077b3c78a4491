"""The cluster under test: real processes on free ports, and their memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from transport.credentials import from_environment

ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def started(log: Path, module: str, *args: str) -> Iterator[tuple[psutil.Process, str]]:
    """``python -m module`` as a process of its own, and the address it listens on."""
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, "--log-json", *args],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us
        )
    try:
        yield psutil.Process(popen.pid), listening_address(popen, log)
    finally:
        popen.terminate()
        try:
            popen.wait(15)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def listening_address(popen: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and popen.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == "listening":
                    return str(entry["address"])
        time.sleep(0.05)
    raise SystemExit(f"a process did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _ask(method: str, url: str) -> httpx.Response:
    return httpx.request(method, url, timeout=10, headers=from_environment())


def wait_ready(controller: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = _ask("GET", f"{controller}/cluster").json()["workers"]
        if sum(worker["state"] == "ready" for worker in workers) == count:
            return
        time.sleep(0.1)
    raise SystemExit(f"not {count} ready workers within 60 s")


def leftovers(controller: str, workers: Sequence[str]) -> dict[str, int]:
    """What is still in flight or waiting; all 0 is how it must end."""
    load = _ask("GET", f"{controller}/cluster").json()["load"]
    left = {"inflight": load["inflight"], "waiting": load["waiting"]}
    statuses = [_ask("POST", f"{w}/worker_get_status").json() for w in workers]
    left["workers_running"] = sum(status["running"] for status in statuses)
    left["workers_waiting"] = sum(status["waiting"] for status in statuses)
    return left


def outcome_counters(controller: str) -> dict[str, int]:
    """How the controller itself says its requests ended."""
    counts: dict[str, int] = {}
    for line in _ask("GET", f"{controller}/metrics").text.splitlines():
        if found := re.fullmatch(r'tandem_requests_total\{.*outcome="(\w+)".*\} (\S+)', line):
            counts[found[1]] = counts.get(found[1], 0) + int(float(found[2]))
    return counts


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory and descriptors after ``done`` requests."""

    at_s: float
    done: int
    rss_bytes: dict[str, int]
    fds: dict[str, int]


def sample(processes: dict[str, psutil.Process], at_s: float, done: int) -> Sample:
    rss = {name: process.memory_info().rss for name, process in processes.items()}
    fds = {name: process.num_fds() for name, process in processes.items()}
    return Sample(at_s, done, rss, fds)


def memory(samples: Sequence[Sample], name: str) -> dict[str, float]:
    """RSS in MB after a tenth, a half and all of the requests, and its slope after the first
    tenth, when everything has been used once."""
    total = samples[-1].done

    def after(share: float) -> float:
        at = next(s for s in samples if s.done >= share * total)
        return round(at.rss_bytes[name] / 1e6, 1)

    points = [(s.done, s.rss_bytes[name] / 1e6) for s in samples if s.done >= 0.1 * total]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return {
        "rss_mb_at_10": after(0.1),
        "rss_mb_at_50": after(0.5),
        "rss_mb_at_100": after(1.0),
        "slope_mb_per_100k_requests": round(slope * 1e5, 2),
    }
