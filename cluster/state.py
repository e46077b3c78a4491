"""The run directory: what ``up`` tells ``status`` and ``down``.

``cluster.json``   the processes, rewritten atomically at each change; gone after a clean stop
``cluster.lock``   locked by the supervisor while it lives, so that two never share a directory
``logs/NAME.log``  what each process says; ``NAME.log.1`` is the one before
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.config import ConfigError
from cluster.machine import is_same_process
from cluster.plan import Role


class State(StrEnum):
    """Of one process of the cluster."""

    WAITING = "waiting"  # its turn to start has not come
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it ended; the next start waits for its pause
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"  # it ended and is given up
    SILENT = "silent"  # as ``status`` saw it: it runs and does not answer


class ProcessRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    role: Role
    kind: str
    state: State
    model: str = ""
    device: str = ""
    precision: str = ""
    address: str | None = None
    pid: int | None = None
    started_at: float | None = None  # of the process; seconds since the epoch
    restarts: int = 0
    progress: str = ""
    last_exit: str | None = None
    log: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether its process still runs."""
        return (
            self.pid is not None
            and self.started_at is not None
            and is_same_process(self.pid, self.started_at)
        )


class ClusterRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    source: str
    supervisor_pid: int
    supervisor_started_at: float
    controller_address: str | None
    processes: tuple[ProcessRecord, ...]

    @property
    def supervised(self) -> bool:
        """Whether its supervisor lives; when not, the record is what a killed one left behind."""
        return is_same_process(self.supervisor_pid, self.supervisor_started_at)

    @property
    def ready(self) -> bool:
        return all(process.state is State.READY for process in self.processes)

    @property
    def survivors(self) -> list[ProcessRecord]:
        return [process for process in self.processes if process.is_ours]


class RunDir:
    """One run directory; nothing is touched before it is ``claimed``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._state = path / "cluster.json"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The directory, made if need be, and nobody else's inside the ``with`` block.

        Raises:
            ConfigError: another supervisor has it, or it cannot be made or written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "cluster.lock").open("ab")
        except OSError as exc:
            raise ConfigError(f"{self.path} cannot be written: {exc.strerror}.") from exc
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"A cluster runs already in {self.path}; `python -m cluster status` shows "
                    "it, `down` stops it, and --run-dir starts another one beside it."
                ) from None
            yield

    def load(self) -> ClusterRecord | None:
        """What is recorded; ``None`` when nothing (readable) is."""
        try:
            return ClusterRecord.model_validate_json(self._state.read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, record: ClusterRecord) -> None:
        """Record it, whole or not at all.

        Raises:
            OSError: the disk does not take it; what was recorded before stands.
        """
        fresh = self._state.with_suffix(".tmp")
        fresh.write_text(record.model_dump_json(indent=2) + "\n")
        fresh.replace(self._state)

    def clear(self) -> None:
        """Forget the record."""
        for path in (self._state, self._state.with_suffix(".tmp")):
            with suppress(OSError):
                path.unlink()


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal a child's whole process group: an engine's helpers are in it too."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
