"""One process of the cluster: launched, listened to, signalled.

Its output comes through a pipe, so a full disk costs log lines instead of the process. It leads
its own session: Ctrl-C reaches the supervisor alone, which then lets the workers drain. On Linux
the kernel sends it SIGTERM when the supervisor dies in whatever way (``cluster.tether``), so that
even then it drains and ends; elsewhere ``down`` finds what is left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from cluster.logfile import LogFile, Tail
from cluster.machine import start_time
from cluster.plan import ROOT, ProcessPlan
from cluster.policy import EXIT_NOT_LAUNCHED
from cluster.state import ProcessRecord, State, signal_group

LAST_WORDS_S = 1.0
"""How long the output of an ended process is waited for."""


class Child:
    """A process across its restarts. The public attributes are what is known about it."""

    def __init__(self, plan: ProcessPlan, log: LogFile) -> None:
        self.plan = plan
        self.log = log
        self.tail = Tail()
        self.state = State.WAITING
        self.port: int | None = plan.port
        self.model = plan.model
        self.device = plan.device
        self.precision = ""
        self.progress = ""
        self.restarts = 0
        self.last_exit: str | None = None
        self.exit_code: int | None = None
        self.settled = anyio.Event()  # it became ready, or is given up
        self._process: asyncio.subprocess.Process | None = None
        self._started_at: float | None = None
        self._silent = anyio.Event()

    @property
    def address(self) -> str | None:
        return None if self.port is None else self.plan.address(self.port)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def given_up(self) -> bool:
        return self.state in (State.FAILED, State.STOPPED)

    async def launch(self, tasks: TaskGroup, port: int, argv: list[str]) -> None:
        """Start the process; ``tasks`` is where its output is read.

        Raises:
            OSError: the operating system cannot start it now.
        """
        self.port, self.exit_code = port, None
        self.tail.clear()
        environment = os.environ | self.plan.env
        paths = (str(ROOT), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["PYTHONUNBUFFERED"] = "1"
        # A pipe of our own: asyncio's would make ``wait`` wait for an engine's helpers too.
        reading, writing = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "cluster.tether", str(os.getpid())),
                *argv,
                cwd=ROOT,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                start_new_session=True,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._started_at = await to_thread.run_sync(start_time, self._process.pid)
        self._silent = anyio.Event()
        tasks.start_soon(self._listen, reading, self._silent)

    async def wait(self) -> int:
        """The exit code, once the process has ended and its output is read.

        Helpers it left behind are killed: they would hold its GPU memory.
        """
        if self._process is None:
            return EXIT_NOT_LAUNCHED
        self.exit_code = await self._process.wait()
        signal_group(self._process.pid, signal.SIGKILL)
        with anyio.move_on_after(LAST_WORDS_S):
            await self._silent.wait()
        return self.exit_code

    def terminate(self) -> None:
        """SIGTERM: it drains; a second one tells it to stop at once."""
        if self.alive and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        if self.alive and self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)

    def record(self) -> ProcessRecord:
        running = self._process if self.alive else None
        return ProcessRecord(
            name=self.plan.name,
            role=self.plan.role,
            kind=self.plan.kind,
            state=self.state,
            model=self.model,
            device=self.device,
            precision=self.precision,
            address=self.address,
            pid=None if running is None else running.pid,
            started_at=None if running is None else self._started_at,
            restarts=self.restarts,
            progress=self.progress,
            last_exit=self.last_exit,
            log=str(self.log.path),
        )

    async def _listen(self, reading: int, silent: anyio.Event) -> None:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", 0)
        )
        try:
            while data := await stream.read(1 << 16):
                self.tail.feed(data)
                await to_thread.run_sync(self.log.write, data)
        finally:
            transport.close()
            silent.set()
