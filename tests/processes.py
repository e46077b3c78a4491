"""Real processes for tests: started on ports the system chooses, gone when the test is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).resolve().parent.parent

T = TypeVar("T")


def until(
    check: Callable[[], T], *, timeout_s: float = 15, what: str = "", say: Callable[[], str] = str
) -> T:
    """Poll ``check`` until it returns something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(httpx.HTTPError):
            if found := check():
                return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or check}\n{say()}")
        time.sleep(0.02)


class Process:
    """``python -m module args`` with its log in a file."""

    def __init__(self, log: Path, module: str, *args: str, env: dict[str, str] | None = None):
        self.log = log
        self.module = module
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                # The tether ends it also when the tests themselves are killed.
                [
                    *(sys.executable, "-m", "cluster.tether", str(os.getpid())),
                    *("-m", module, "--log-json", *args),
                ],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def entries(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        entries = []
        for line in self.log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict)]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def address(self, timeout_s: float = 15) -> str:
        """Where it listens, from its log."""

        def listening() -> str:
            self._must_live()
            return next((e["address"] for e in self.entries() if e["event"] == "listening"), "")

        return until(listening, timeout_s=timeout_s, what=f"{self.module} listens", say=self.tail)

    def wait_ready(self, timeout_s: float = 15) -> str:
        """Its address, once ``/healthz`` says 200."""
        address = self.address(max(15, timeout_s))

        def ready() -> bool:
            self._must_live()
            return httpx.get(f"{address}/healthz").status_code == 200

        until(ready, timeout_s=timeout_s, what=f"{self.module} is ready", say=self.tail)
        return address

    def _must_live(self) -> None:
        if self._popen.poll() is not None:
            code = self._popen.returncode
            raise AssertionError(f"{self.module} ended with {code}:\n{self.tail()}")

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout_s: float = 15) -> int:
        """Its exit code, when it has ended."""
        return self._popen.wait(timeout_s)

    def kill(self) -> None:
        """``kill -9`` of this process alone; its children are its own affair."""
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to its whole group if that does not help."""
        self._popen.terminate()
        try:
            self._popen.wait(20)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()


@contextmanager
def running(
    folder: Path, module: str, *args: str, env: dict[str, str] | None = None
) -> Iterator[Process]:
    """A process that ends with the block."""
    number = len(list(folder.glob("*.log")))
    process = Process(folder / f"{number}-{module}.log", module, *args, env=env)
    try:
        yield process
    finally:
        process.stop()


def workers_of(controller: str) -> dict[str, dict[str, Any]]:
    """The controller's workers by id."""
    found = httpx.get(f"{controller}/cluster").json()["workers"]
    return {worker["worker_id"]: worker for worker in found}


def wait_workers(controller: str, count: int, timeout_s: float = 15) -> None:
    """Until exactly ``count`` workers are ready."""
    until(
        lambda: sum(w["state"] == "ready" for w in workers_of(controller).values()) == count,
        timeout_s=timeout_s,
        what=f"{count} ready workers",
        say=lambda: str(workers_of(controller)),
    )
