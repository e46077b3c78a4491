"""What ``up``, ``status`` and ``down`` do, each ending in an exit code."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio

from cluster import machine, probe
from cluster.config import ConfigError
from cluster.plan import ROOT, Plan, demo, load
from cluster.state import (
    ClusterRecord,
    ProcessRecord,
    RunDir,
    State,
    signal_group,
)
from cluster.supervisor import ABORT_LIMIT_S, DRAIN_LIMIT_S, Supervisor
from cluster.view import View, make_console, process_table

DEFAULT_RUN_DIR = ROOT / "run"
NOT_READY = 1
SUPERVISOR_LIMIT_S = DRAIN_LIMIT_S + ABORT_LIMIT_S + 4.0


def up(file: Path | None, run_dir_path: Path, *, log_json: bool) -> int:
    """Start a cluster and return when it has stopped.

    Raises:
        ConfigError: it cannot be started as asked.
    """
    plan = demo(gpu=machine.gpu_present()) if file is None else load(file)
    run_dir = RunDir(run_dir_path.expanduser().resolve())
    console = make_console()
    if plan.page is not None and not machine.installed("gradio"):
        console.print("The chat page is left out: it needs Gradio (pip install 'tandem[ui]').")
        plan = dataclasses.replace(plan, page=None)
    elsewhere = run_dir.path != DEFAULT_RUN_DIR
    view = View(console, options=f" --run-dir {run_dir.path}" if elsewhere else "")
    with run_dir.claimed():
        stale = run_dir.load()
        if stale is not None and stale.survivors:
            console.print("Stopping what a killed cluster left behind.")
            _end(stale.survivors)
        _check_ports(plan)

        async def supervise() -> int:
            return await Supervisor(plan, run_dir, view, log_json=log_json).run()

        code = anyio.run(supervise)
    console.print("Everything has stopped. Until next time." if code == 0 else "Stopped.")
    return code


def status(run_dir_path: Path, *, as_json: bool) -> int:
    """Show what runs. 0: everything is ready; 1: it is not, or nothing runs."""
    record = RunDir(run_dir_path).load()
    console = make_console()
    if record is not None:
        record = anyio.run(_as_of_now, record)
    supervised = record is not None and record.supervised
    ready = supervised and record is not None and record.ready
    if as_json:
        found = {} if record is None else record.model_dump(mode="json")
        stale = record is not None and not supervised
        facts = {"running": supervised, "ready": ready, "stale": stale, **found}
        console.file.write(json.dumps(facts) + "\n")
    elif record is None:
        console.print(f"No cluster runs here ({run_dir_path}).")
    else:
        console.print(process_table(record.processes))
        if not supervised:
            left = ", ".join(process.name for process in record.survivors) or "nothing"
            console.print(
                f"\nIts supervisor (pid {record.supervisor_pid}) is gone without a goodbye; "
                f"{left} still runs; `python -m cluster down` cleans up.",
                soft_wrap=True,
            )
    return 0 if ready else NOT_READY


def down(run_dir_path: Path) -> int:
    """Stop what runs; 0 also when nothing did.

    Raises:
        ConfigError: it belongs to another user.
    """
    run_dir = RunDir(run_dir_path)
    record = run_dir.load()
    console = make_console()
    if record is None:
        console.print(f"No cluster runs here ({run_dir_path}).")
        return 0
    try:
        if record.supervised:
            console.print("Stopping: running requests may finish.")
            os.kill(record.supervisor_pid, signal.SIGTERM)
            if not _within(SUPERVISOR_LIMIT_S, lambda: not record.supervised):
                os.kill(record.supervisor_pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError as exc:
        raise ConfigError("The cluster belongs to another user.") from exc
    _end(record.survivors)
    run_dir.clear()
    console.print("Everything has stopped.")
    return 0


def _check_ports(plan: Plan) -> None:
    for process in plan.processes:
        try:
            machine.check_port(process.host, process.port or 0)
        except OSError as exc:
            place = f"{process.host}:{process.port or 'auto'}"
            reason = exc.strerror or str(exc)
            if exc.errno == errno.EADDRINUSE:
                reason = "another process has that port; choose another, or `port: auto`"
            raise ConfigError(f"{process.name} cannot listen on {place}: {reason}.") from exc


async def _as_of_now(record: ClusterRecord) -> ClusterRecord:
    """The record, corrected by what the processes say at this moment."""
    async with probe.client() as http:
        now: dict[str, ProcessRecord] = {}

        async def look(process: ProcessRecord) -> None:
            if not process.is_ours:
                ended = State.STOPPED if process.pid is not None else process.state
                now[process.name] = process.model_copy(update={"state": ended, "pid": None})
                return
            health = await probe.health(http, process.address or "")
            if process.state is State.READY and health is None:
                now[process.name] = process.model_copy(update={"state": State.SILENT})

        async with anyio.create_task_group() as looks:
            for process in record.processes:
                looks.start_soon(look, process)
    processes = tuple(now.get(process.name, process) for process in record.processes)
    return record.model_copy(update={"processes": processes})


def _end(processes: list[ProcessRecord]) -> None:
    """Drain, then kill, processes whose supervisor is gone."""
    for process in processes:
        if process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGTERM)
    if _within(DRAIN_LIMIT_S, lambda: not any(process.is_ours for process in processes)):
        return
    for process in processes:
        if process.is_ours and process.pid is not None:
            signal_group(process.pid, signal.SIGKILL)


def _within(limit_s: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
