"""Starts the processes of a plan, keeps them alive, and stops them.

The controller comes first; when it answers, the page and all workers start together, each watched
by a task of its own. Stopping is one path, however it was asked for: SIGTERM to all, so that they
drain; after ``DRAIN_LIMIT_S`` a second one, so that they end their streams with an error; after
``ABORT_LIMIT_S`` more, SIGKILL.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import anyio
from anyio import to_thread

from cluster import machine, probe
from cluster.child import Child
from cluster.logfile import LogFile
from cluster.plan import Plan, Role
from cluster.policy import EXIT_NOT_LAUNCHED, Exit, GiveUp, History, after_exit, in_words
from cluster.state import ClusterRecord, RunDir, State
from cluster.view import View
from transport.exits import EXIT_START_FAILED, EXIT_USAGE

DRAIN_LIMIT_S = 6.0
ABORT_LIMIT_S = 2.0
REGISTER_LIMIT_S = 10.0
"""How long a worker that is up may take to appear at the controller; then it counts as ready."""

ONE_KEY_S = 0.3
"""A second signal this soon is the first one again: timeout(1) and make deliver one key twice."""

POLL_S = 0.2
LOG_LINES = 5
"""How many of its last log lines explain a crash."""


class Supervisor:
    """Runs one plan once."""

    def __init__(
        self,
        plan: Plan,
        run_dir: RunDir,
        view: View,
        *,
        log_json: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._run_dir = run_dir
        self._view = view
        self._log_json = log_json
        self._clock = clock
        self._children = [
            Child(process, LogFile(run_dir.logs / f"{process.name}.log"))
            for process in plan.processes
        ]
        self._controller, *self._others = self._children
        self._workers = [child for child in self._others if child.plan.role is Role.WORKER]
        self._changed = anyio.Event()
        self._working = anyio.CancelScope()
        self._started_at = 0.0
        self._state_lost = False
        self._code = 0

    async def run(self) -> int:
        """The exit code, when the cluster has been told to stop or cannot go on.

        Nothing it started is left when this returns or raises.
        """
        started_at = await to_thread.run_sync(machine.start_time, os.getpid())
        self._started_at = started_at or 0.0
        try:
            async with probe.client() as self._http, anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._obey_signals)
                self._tasks.start_soon(self._persist)
                try:
                    with self._working:
                        await self._work()
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._stop_all()
                    self._tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(self._run_dir.clear)
        return self._code

    async def _work(self) -> None:
        begun = self._clock()
        async with anyio.create_task_group() as keepers:
            keepers.start_soon(self._draw)
            for child in self._children:
                await to_thread.run_sync(child.log.rotate)
            keepers.start_soon(self._keep, self._controller)
            await self._controller.settled.wait()
            for child in self._others:
                keepers.start_soon(self._keep, child)
            for child in self._others:
                await child.settled.wait()
            if self._workers and all(worker.given_up for worker in self._workers):
                self._give_up("No worker could be started, so the cluster stops.")
            else:
                self._view.ready(self._records(), self._clock() - begun)

    def _give_up(self, sentence: str) -> None:
        self._view.note(sentence)
        failed = [child for child in self._children if child.state is State.FAILED]
        if failed:
            refused = all(child.exit_code == EXIT_USAGE for child in failed)
            self._code = EXIT_USAGE if refused else EXIT_START_FAILED
        self._working.cancel()

    # ------------------------------------------------------------ one process

    async def _keep(self, child: Child) -> None:
        """Start ``child`` and start it again, until it is given up."""
        history = History()
        while True:
            ended = await self._run_once(child)
            history, verdict = after_exit(history, ended)
            child.last_exit = in_words(ended.code)
            child.progress = ""
            if isinstance(verdict, GiveUp):
                child.state = State.STOPPED if verdict.clean else State.FAILED
                self._tell(child, f"{child.last_exit}; {verdict.because}.", explain=True)
                child.settled.set()
                if child.plan.role is Role.CONTROLLER:
                    self._give_up("Without its controller the cluster stops.")
                return
            child.state = State.RESTARTING
            again = f"{child.last_exit}; starting it again in {verdict.after_s:g} s."
            self._tell(child, again, explain=True)
            await anyio.sleep(verdict.after_s)
            child.restarts += 1

    async def _run_once(self, child: Child) -> Exit:
        ready_at: float | None = None

        async def watch() -> None:
            nonlocal ready_at
            await self._until_ready(child)
            ready_at = self._clock()
            child.state, child.progress = State.READY, ""
            child.settled.set()
            self._tell(child, f"is ready at {child.address}", explain=False)

        child.state, child.progress = State.STARTING, "launching"
        self._note_change()
        try:
            with anyio.CancelScope(shield=True):  # half a launch would be a process nobody knows
                await self._launch(child)
        except OSError as exc:
            child.tail.feed(f"{exc}\n".encode())
            return Exit(EXIT_NOT_LAUNCHED, None)
        self._note_change()
        async with anyio.create_task_group() as watching:
            watching.start_soon(watch)
            code = await child.wait()
            watching.cancel_scope.cancel()
        return Exit(code, None if ready_at is None else self._clock() - ready_at)

    async def _launch(self, child: Child) -> None:
        port = self._port(child)
        controller = self._controller.address or ""
        argv = child.plan.argv(port, controller, log_json=self._log_json)
        await child.launch(self._tasks, port, argv)

    def _port(self, child: Child) -> int:
        """The planned port, or the one it had if that is free, or another free one.

        Raises:
            OSError: the host is no address of this machine.
        """
        if child.plan.port is not None:
            return child.plan.port
        if child.port is not None:
            try:
                machine.check_port(child.plan.host, child.port)
            except OSError:
                child.port = None
        if child.port is None:
            child.port = machine.free_port(
                child.plan.host, besides={other.port for other in self._children}
            )
        return child.port

    async def _until_ready(self, child: Child) -> None:
        """Return when ``child`` serves, and its controller knows it."""
        address = child.address or ""
        while (health := await probe.health(self._http, address)) is None or not health.ready:
            if health is not None and health.progress != child.progress:
                child.progress = health.progress
                self._tell(child, f"{health.progress} ...", explain=False, passing=True)
            await anyio.sleep(POLL_S)
        if child.plan.role is not Role.WORKER:
            return
        await self._describe(child, address)
        with anyio.move_on_after(REGISTER_LIMIT_S):
            controller = self._controller.address or ""
            while True:
                if address in await probe.routable(self._http, controller):
                    return
                await anyio.sleep(POLL_S)

    async def _describe(self, child: Child, address: str) -> None:
        status = await probe.worker_status(self._http, address)
        if status is not None:
            child.model = ", ".join(status.model_names)
            child.device = status.device or child.device
            child.precision = status.precision if status.precision not in (None, "none") else ""

    # ------------------------------------------------------------ stopping

    async def _obey_signals(self) -> None:
        wanted = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            wanted.append(signal.SIGHUP)
        first_at: float | None = None
        with anyio.open_signal_receiver(*wanted) as signals:
            async for _ in signals:
                if first_at is not None and self._clock() - first_at < ONE_KEY_S:
                    continue
                if self._working.cancel_called:
                    self._view.note("Stopping at once.")
                    for child in self._children:
                        child.kill()
                else:
                    first_at = self._clock()
                    self._working.cancel()

    async def _stop_all(self) -> None:
        self._view.close()
        living = [child for child in self._children if child.alive]
        if living:
            self._view.note("Stopping: running requests may finish; Ctrl-C again stops at once.")
        async with anyio.create_task_group() as stops:
            for child in living:
                stops.start_soon(self._stop, child)

    async def _stop(self, child: Child) -> None:
        child.state = State.STOPPING
        self._note_change()
        child.terminate()
        with anyio.move_on_after(DRAIN_LIMIT_S):
            await child.wait()
        if child.alive:
            child.terminate()
            with anyio.move_on_after(ABORT_LIMIT_S):
                await child.wait()
        if child.alive:
            child.kill()
            await child.wait()
            self._view.note(f"{child.plan.name} did not stop in time and was killed.")
        child.state = State.STOPPED
        self._note_change()

    # ------------------------------------------------------------ telling

    def _tell(self, child: Child, what: str, *, explain: bool, passing: bool = False) -> None:
        lines = child.tail.last(LOG_LINES) if explain else []
        log = child.log.path if explain else None
        self._view.event(child.plan.name, what, lines, log=log, passing=passing)
        self._note_change()

    def _records(self) -> ClusterRecord:
        return ClusterRecord(
            source=self._plan.source,
            supervisor_pid=os.getpid(),
            supervisor_started_at=self._started_at,
            controller_address=self._controller.address,
            processes=tuple(child.record() for child in self._children),
        )

    def _note_change(self) -> None:
        self._changed.set()

    async def _persist(self) -> None:
        while True:
            self._changed = anyio.Event()
            try:
                await to_thread.run_sync(self._run_dir.save, self._records())
                self._state_lost = False
            except OSError as exc:
                if not self._state_lost:
                    self._state_lost = True
                    self._view.note(
                        f"{self._run_dir.path} cannot be written ({exc.strerror}); the cluster "
                        "runs on, but `status` and `down` do not know it."
                    )
            await self._changed.wait()

    async def _draw(self) -> None:
        while self._view.live:
            self._view.draw(self._records())
            await anyio.sleep(0.1)
