"""The supervisor on tiny stand-ins for its processes: starts, give-ups, restarts, stops."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from anyio import to_thread
from rich.console import Console

from cluster import policy, supervisor
from cluster.plan import Plan, ProcessPlan, Role
from cluster.state import ClusterRecord, ProcessRecord, RunDir, State
from cluster.supervisor import Supervisor
from cluster.view import View

STAND_IN = '''
"""A controller or worker by its HTTP face; argv after its flags: what it shall do."""
import http.server, json, os, signal, subprocess, sys, time, urllib.request

def flag(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None

behaviour, listed = sys.argv[-1], []
if behaviour.startswith("exit "):
    sys.exit("a sentence that says why" if behaviour == "exit 1" else int(behaviour[5:]))
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else lambda *_: os._exit(0))
begun = time.monotonic()

class Face(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.listed = listed
        loading = behaviour == "load" and time.monotonic() < begun + 0.3
        body = {"/cluster": {"workers": listed}}.get(self.path, {"progress": "loading weights"})
        self.answer(503 if loading else 200, body)
    def do_POST(self):
        if self.path == "/register":
            listed.append({"address": self.headers["X-Address"], "state": "ready"})
        self.answer(200, {"model_names": ["m"], "device": "cpu", "precision": "float32"})
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer((flag("--host"), int(flag("--port"))), Face)
if address := flag("--worker-address"):
    headers = {"X-Address": address}
    url = flag("--controller-address") + "/register"
    urllib.request.urlopen(urllib.request.Request(url, data=b"", headers=headers), timeout=5)
if behaviour == "helper":
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
server.serve_forever()
'''


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    monkeypatch.setattr(supervisor, "DRAIN_LIMIT_S", 0.5)
    monkeypatch.setattr(supervisor, "ABORT_LIMIT_S", 0.1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    run_dir = RunDir(tmp_path / "run")
    with run_dir.claimed():
        yield run_dir


class Running:
    """A supervisor at work, seen through what it writes."""

    def __init__(self, run_dir: RunDir, output: io.StringIO) -> None:
        self.run_dir = run_dir
        self.output = output
        self.code: int | None = None
        self.ended = anyio.Event()

    async def until(self, condition: Callable[[ClusterRecord], bool]) -> ClusterRecord:
        with anyio.fail_after(10):
            while True:
                record = await to_thread.run_sync(self.run_dir.load)
                if record is not None and condition(record):
                    return record
                await anyio.sleep(0.02)

    @property
    def said(self) -> str:
        return self.output.getvalue()


@asynccontextmanager
async def running(run_dir: RunDir, *behaviours: str) -> AsyncGenerator[Running]:
    """A controller and one worker for each behaviour; ended by SIGINT if it has not ended."""
    controller, *workers = (
        ProcessPlan(
            name=f"w{number}" if number else "controller",
            role=Role.WORKER if number else Role.CONTROLLER,
            kind="stand-in",
            module="stand_in",
            host="127.0.0.1",
            port=None,
            args=(behaviour,),
            env={"PYTHONPATH": str(run_dir.path.parent)},
        )
        for number, behaviour in enumerate(behaviours)
    )
    output = io.StringIO()
    view = View(Console(file=output, width=300, highlight=False, markup=False))
    cluster = Supervisor(Plan("test", controller, tuple(workers)), run_dir, view)
    seen = Running(run_dir, output)

    async def run() -> None:
        seen.code = await cluster.run()
        seen.ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield seen
        if not seen.ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)
        with anyio.fail_after(10):
            await seen.ended.wait()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while True:
            if condition():
                return
            await anyio.sleep(0.02)


def worker(record: ClusterRecord) -> ProcessRecord:
    return record.processes[1]


async def test_it_starts_tells_and_stops(run_dir: RunDir) -> None:
    async with running(run_dir, "serve", "load") as seen:
        record = await seen.until(lambda record: record.ready)
        assert worker(record).model == "m"
        assert worker(record).device == "cpu"
        pids = [process.pid for process in record.processes]
    assert seen.code == 0
    assert not any(psutil.pid_exists(pid or 0) for pid in pids)
    assert seen.run_dir.load() is None
    said = seen.said
    assert "w1 loading weights ..." in said
    assert "ready in " in said
    assert f"curl -N {record.controller_address}/v1/chat/completions" in said


async def test_a_crash_is_explained_and_healed_and_its_helpers_are_gone(run_dir: RunDir) -> None:
    async with running(run_dir, "serve", "helper") as seen:
        first = worker(await seen.until(lambda record: record.ready))
        helper = int((seen.run_dir.logs / "w1.log").read_text())
        os.kill(first.pid or 0, signal.SIGKILL)
        second = worker(await seen.until(lambda r: r.ready and worker(r).pid != first.pid))
        assert second.restarts == 1
        assert second.address == first.address
        await until(lambda: not psutil.pid_exists(helper))
    said = seen.said
    assert "w1 was killed by SIGKILL (signal 9" in said
    assert f"| {helper}" in said  # the last line of its log
    assert seen.code == 0


async def test_a_worker_that_cannot_start_is_given_up_and_the_rest_goes_on(run_dir: RunDir) -> None:
    async with running(run_dir, "serve", "exit 1", "serve") as seen:
        record = await seen.until(lambda record: record.processes[2].state is State.READY)
        record = await seen.until(lambda record: worker(record).state is State.FAILED)
        assert record.processes[0].state is State.READY
    said = seen.said
    assert said.count("starting it again") == 2
    assert "it failed to start 3 times in a row" in said
    assert "| a sentence that says why" in said
    assert "s, but without w1" in said
    assert seen.code == 0


@pytest.mark.parametrize(("behaviour", "code"), [("exit 2", 2), ("exit 3", 3)])
async def test_no_worker_left_ends_the_cluster(run_dir: RunDir, behaviour: str, code: int) -> None:
    async with running(run_dir, "serve", behaviour) as seen:
        await seen.ended.wait()
    assert seen.code == code
    assert "No worker could be started" in seen.said


async def test_no_controller_ends_the_cluster(run_dir: RunDir) -> None:
    async with running(run_dir, "exit 3", "serve") as seen:
        await seen.ended.wait()
    assert seen.code == 3
    assert "Without its controller the cluster stops." in seen.said
    assert "w1" not in seen.said


async def test_a_worker_stopped_on_purpose_stays_stopped(run_dir: RunDir) -> None:
    async with running(run_dir, "serve", "serve") as seen:
        record = await seen.until(lambda record: record.ready)
        os.kill(worker(record).pid or 0, signal.SIGTERM)
        record = await seen.until(lambda record: worker(record).state is State.STOPPED)
        assert worker(record).last_exit == "stopped cleanly (exit code 0)"
    assert seen.code == 0


async def test_a_deaf_worker_is_killed(run_dir: RunDir) -> None:
    async with running(run_dir, "serve", "deaf") as seen:
        record = await seen.until(lambda record: record.ready)
    assert "w1 did not stop in time and was killed." in seen.said
    assert not psutil.pid_exists(worker(record).pid or 0)


async def test_a_second_signal_does_not_wait(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "DRAIN_LIMIT_S", 600.0)
    monkeypatch.setattr(supervisor, "ONE_KEY_S", 0.0)
    async with running(run_dir, "serve", "deaf") as seen:
        await seen.until(lambda record: record.ready)
        os.kill(os.getpid(), signal.SIGINT)
        await seen.until(lambda record: worker(record).state is State.STOPPING)
        os.kill(os.getpid(), signal.SIGINT)
        with anyio.fail_after(5):
            await seen.ended.wait()
    assert seen.code == 0


async def test_a_disk_that_takes_nothing_does_not_stop_it(run_dir: RunDir) -> None:
    (run_dir.logs / "controller.log").mkdir()  # neither a log can be written there
    (run_dir.path / "cluster.tmp").mkdir()  # nor the state
    async with running(run_dir, "serve", "load") as seen:
        await until(lambda: "ready in " in seen.said)
    assert seen.said.count("cannot be written") == 1
    assert seen.code == 0


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    record = ClusterRecord(
        source="c.yaml",
        supervisor_pid=1,
        supervisor_started_at=0,
        controller_address="http://127.0.0.1:1",
        processes=(),
    )
    RunDir(tmp_path).save(record)
    assert json.loads((tmp_path / "cluster.json").read_text())["supervisor_pid"] == 1
