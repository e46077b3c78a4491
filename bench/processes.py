"""The processes under test: on ports the system chooses, gone when their block is."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from rich.console import Console
from rich.progress import track

from protocol.messages import WorkerStatus
from transport.credentials import from_environment

ROOT = Path(__file__).resolve().parent.parent

START_S = 900.0  # a large checkpoint from a cold disk
STOP_S = 40.0  # a worker lets running answers end for 30 s
_TAIL_LINES = 20

T = TypeVar("T")


class ProcessFailed(Exception):
    """A process did not start or ended early; the text is a sentence and the end of its log."""


@dataclass(frozen=True, slots=True)
class Running:
    """A process that is ready."""

    address: str
    process: psutil.Process
    log: Path

    def status(self) -> WorkerStatus:
        """What it, a worker, says about itself.

        Raises:
            ProcessFailed: it does not answer.
        """
        url = f"{self.address}/worker_get_status"
        try:
            answer = httpx.post(
                url, timeout=30, trust_env=False, headers=from_environment()
            ).raise_for_status()
        except httpx.HTTPError as exc:
            raise ProcessFailed(
                f"{self.address} does not answer: {exc}.\n{tail(self.log)}"
            ) from exc
        return WorkerStatus.model_validate_json(answer.content)

    def events(self) -> list[str]:
        """The names of what it has logged."""
        return [str(entry["event"]) for entry in _entries(self.log)]

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory: all (rss), what no other process shares (uss), what is no file (anon).

        Libraries count as unshared only while no other process on the machine has them loaded.
        """
        found = self.process.memory_full_info()
        return {"rss": found.rss, "uss": found.uss, "anon": _anonymous_bytes(self.process.pid)}

    def wait_idle(self, timeout_s: float = 15) -> int:
        """How many requests it still holds when none should be left.

        Raises:
            ProcessFailed: it does not answer.
        """
        deadline = time.monotonic() + timeout_s
        while (held := self.status().queue_length) and time.monotonic() < deadline:
            time.sleep(0.05)
        return held


class Harness:
    """Starts processes with the flags that all workers of one run share.

    Args:
        folder: for their logs.
        flags: of every worker, the model and the device for instance.
    """

    def __init__(self, folder: Path, console: Console, flags: tuple[str, ...]) -> None:
        self.folder = folder
        self.console = console
        self._flags = flags

    def track(self, steps: Collection[T], description: str) -> Iterable[T]:
        """``steps``, with a bar that goes when they have ended."""
        console = Console(stderr=True)
        return track(steps, description=description, console=console, transient=True)

    def with_flags(self, *flags: str) -> Harness:
        """The same with more flags for every worker."""
        return Harness(self.folder, self.console, (*self._flags, *flags))

    @contextmanager
    def worker(
        self, *flags: str, kind: str = "hf", controller: str | None = None
    ) -> Iterator[Running]:
        """A worker of ``kind``, registered at ``controller`` if there is one.

        Raises:
            ProcessFailed: it did not become ready.
        """
        place = ("--no-register",) if controller is None else ("--controller-address", controller)
        with self.process(f"workers.{kind}", *self._flags, *flags, *place) as running:
            yield running

    @contextmanager
    def process(self, module: str, *flags: str) -> Iterator[Running]:
        """``python -m module flags``, ready.

        Raises:
            ProcessFailed: it did not become ready.
        """
        with self.processes((module, flags)) as (running,):
            yield running

    @contextmanager
    def processes(self, *commands: tuple[str, Sequence[str]]) -> Iterator[list[Running]]:
        """A ``python -m module flags`` for each of ``commands``, started together, all ready.

        Raises:
            ProcessFailed: one did not become ready.
        """
        with ExitStack() as stack:
            begun = [stack.enter_context(self._begun(*command)) for command in commands]
            with self.console.status("starting") as spinner:
                addresses = [_ready(*one, spinner) for one in begun]
            yield [
                Running(address, psutil.Process(popen.pid), log)
                for address, (popen, log, _) in zip(addresses, begun, strict=True)
            ]

    @contextmanager
    def _begun(
        self, module: str, flags: Sequence[str]
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path, str]]:
        """A process that ends with the block, its log and how one would start it by hand."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}-{module}.log"
        line = ("--port", "0", *flags)
        with log.open("wb") as output:
            popen = subprocess.Popen(
                # The tether ends it also when the benchmark itself is killed.
                [
                    *(sys.executable, "-m", "cluster.tether", str(os.getpid())),
                    *("-m", module, "--log-json", *line),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us
            )
        try:
            yield popen, log, f"python -m {module} {shlex.join(line)}"
        finally:
            _stop(popen)


def _anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def is_batched(harness: Harness, worker: Running) -> bool:
    """Whether a worker that may batch does; prints its reason if not."""
    mark = "requests decode in threads of their own"
    why = next((event for event in worker.events() if event.startswith(mark)), None)
    if why is not None:
        harness.console.print(f"the worker with --batching auto does not batch: {why}", style="red")
    return why is None


def _ready(popen: subprocess.Popen[bytes], log: Path, command: str, spinner: Any) -> str:
    """The address of a process once ``/healthz`` says 200; ``spinner`` shows how far it is."""
    deadline = time.monotonic() + START_S
    address = ""
    while time.monotonic() < deadline:
        if popen.poll() is not None:
            why = f"`{command}` ended with {popen.returncode} before it was ready."
            raise ProcessFailed(f"{why}\n{tail(log)}")
        entries = _entries(log)
        if entries:
            spinner.update(f"{command}: {entries[-1]['event'][:60]}")
        address = address or next(
            (str(entry["address"]) for entry in entries if entry["event"] == "listening"), ""
        )
        with suppress(httpx.HTTPError):
            healthz = f"{address}/healthz"
            if address and httpx.get(healthz, timeout=5, trust_env=False).status_code == 200:
                return address
        time.sleep(0.05)
    raise ProcessFailed(f"`{command}` was not ready within {START_S:.0f} s.\n{tail(log)}")


def _stop(popen: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL to its whole group if that or our user's patience ends."""
    popen.terminate()
    try:
        popen.wait(STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as exc:
        with suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
        if isinstance(exc, KeyboardInterrupt):
            raise


def _entries(log: Path) -> list[dict[str, Any]]:
    entries = []
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "event" in entry:
                entries.append(entry)
    return entries


def tail(log: Path) -> str:
    """The last lines of a log, entries as their sentences."""
    lines: list[str] = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            event = f"{entry['level']} {entry['event']}\n{entry.get('traceback', '')}"
        except (ValueError, KeyError, TypeError):
            lines.append(line)
            continue
        # The command has said its settings, and there are thousands of requests.
        if not entry["event"].startswith(("settings ", "finished")):
            lines += event.splitlines()
    return "\n".join(f"  {line[:1000]}" for line in lines[-_TAIL_LINES:])
