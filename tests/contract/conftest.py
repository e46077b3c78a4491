"""One worker of each kind, started once, as its users start it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.processes import ROOT, Process, running

# float32: on the CPU both engines then compute the same numbers.
ADAPTERS = ROOT / "models" / "adapters"
EXACT = (
    *("--dtype", "float32", "--device", "cpu"),
    *("--adapter", f"formal={ADAPTERS / 'formal'}", "--adapter", f"terse={ADAPTERS / 'terse'}"),
)
FLAGS = {
    "echo": ("--model-name", "pocket-llava", "--first-delay-s", "0.02", "--delay-s", "0.001"),
    "hf": EXACT,
    "hf in threads": (*EXACT, "--batching", "off"),
    "sglang": EXACT,
}
REAL_KINDS = ("hf", "sglang")
START_TIMEOUT_S = 240  # SGLang imports for half a minute, longer on a busy machine


@dataclass(frozen=True)
class Worker:
    kind: str
    address: str
    process: Process


class Workers:
    """Workers by the keys of ``FLAGS``, whose first word is the kind; started when asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._started: dict[str, Worker] = {}

    def __getitem__(self, name: str) -> Worker:
        if name not in self._started:
            kind = name.split()[0]
            flags = ("--port", "0", "--no-register", *FLAGS[name])
            process = self._stack.enter_context(running(self._folder, f"workers.{kind}", *flags))
            address = process.wait_ready(START_TIMEOUT_S)
            self._started[name] = Worker(kind, address, process)
        return self._started[name]


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(tmp_path_factory.mktemp("workers"), stack)


@pytest.fixture(scope="session")
def controller(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A controller in front of one worker of each kind."""
    log = tmp_path_factory.mktemp("controller")
    with running(log, "controller", "--port", "0") as process:
        address = process.wait_ready()
        for kind in REAL_KINDS:
            # They beat at no controller, so this one is told not to wait for it.
            registration = {"worker_name": workers[kind].address, "check_heart_beat": False}
            httpx.post(f"{address}/register_worker", json=registration).raise_for_status()
        yield address


@pytest.fixture(params=list(FLAGS))
def worker(request: pytest.FixtureRequest, workers: Workers) -> Worker:
    return workers[request.param]
