"""`python -m cluster` as a person uses it, on echo workers.

make test     or     .venv/bin/pytest tests/process/test_cluster.py
"""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.machine import is_same_process
from cluster.plan import ROOT
from cluster.state import RunDir

pytestmark = pytest.mark.timeout(120)

PATIENCE_S = 30.0
"""For what takes a second where nothing else runs."""

TWO_ECHOES = """
controller: {port: auto}
workers:
  - {kind: echo, count: 2, args: [--delay-s, "0.02"]}
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Terminal:
    """A folder with a cluster file, and `python -m cluster` started from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exported: dict[str, str] = {}
        self.run_dir = folder / "run"
        self.output = folder / "output"
        self.ups: list[subprocess.Popen[bytes]] = []

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "cluster", *args, "--run-dir", str(self.run_dir)]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(ROOT)} | self.exported

    def call(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def up(self, text: str = TWO_ECHOES) -> subprocess.Popen[bytes]:
        (self.folder / "cluster.yaml").write_text(text)
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                self.command("up", "cluster.yaml"),
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        self.ups.append(process)
        return process

    def status(self) -> dict[str, Any]:
        found = json.loads(self.call("status", "--json").stdout)
        assert isinstance(found, dict)
        return found

    def until_ready(self, *, restarts: int = 0) -> dict[str, Any]:
        """The status once all is ready, after that many restarts."""

        def ready() -> bool:  # read here: a process for each look would cost more than the test
            record = RunDir(self.run_dir).load()
            return (
                record is not None
                and record.supervised
                and record.ready
                and sum(process.restarts for process in record.processes) == restarts
            )

        until(ready)
        status = self.status()
        assert status["running"]
        assert status["ready"]
        return status

    @property
    def said(self) -> str:
        return self.output.read_text()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    for process in terminal.ups:
        if process.poll() is None:
            process.kill()
            process.wait()
    terminal.call("down")


def pids(status: dict[str, Any]) -> list[int]:
    return [process["pid"] for process in status["processes"]]


def gone(status: dict[str, Any]) -> bool:
    """Whether none of its processes runs; zombies wait for somebody else to reap them."""
    return not any(is_same_process(p["pid"], p["started_at"]) for p in status["processes"])


def streamed(status: dict[str, Any]) -> list[str]:
    """The pieces of an answer, as the pasted curl would get them."""
    body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": "ping"}]}
    pieces = []
    url = f"{status['controller_address']}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_S, trust_env=False) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                pieces += [choice["delta"].get("content") or "" for choice in choices]
    return [piece for piece in pieces if piece]


def test_a_cluster_serves_heals_and_goes_down(terminal: Terminal) -> None:
    process = terminal.up()
    first = terminal.until_ready()
    assert [p["name"] for p in first["processes"]] == ["controller", "echo-1", "echo-2"]
    assert "ready in " in terminal.said
    assert f"curl -N {first['controller_address']}/v1/chat/completions" in terminal.said
    pieces = streamed(first)
    assert len(pieces) > 1
    assert "ping" in "".join(pieces)

    os.kill(first["processes"][1]["pid"], signal.SIGKILL)
    second = terminal.until_ready(restarts=1)
    assert second["processes"][1]["pid"] != first["processes"][1]["pid"]
    assert "echo-1 was killed by SIGKILL" in terminal.said
    assert "           | " in terminal.said  # the last lines of its log
    assert streamed(second)

    down = terminal.call("down")
    assert down.returncode == 0
    assert process.wait(PATIENCE_S) == 0
    assert gone(second)
    assert terminal.status() == {"running": False, "ready": False, "stale": False}
    assert terminal.call("down").returncode == 0


def test_a_cluster_with_a_token(terminal: Terminal) -> None:
    """Exported once, it is everywhere: in the processes, and in the supervisor's questions."""
    token = "the-token-of-this-cluster"
    terminal.exported = {"TANDEM_CLUSTER_TOKEN": token}
    terminal.up(TWO_ECHOES.replace("{port: auto}", "{port: auto, host: 0.0.0.0}"))
    status = terminal.until_ready()
    controller = status["controller_address"]
    for headers, code in (({}, 401), ({"authorization": f"Bearer {token}"}, 200)):
        found = httpx.get(f"{controller}/cluster", headers=headers, trust_env=False)
        assert found.status_code == code
    assert len(found.json()["workers"]) == 2
    assert terminal.call("down").returncode == 0
    for file in (terminal.folder / "run").rglob("*.*"):
        assert token not in file.read_text(errors="replace"), file


def test_a_controller_that_crashes_comes_back_with_its_workers(terminal: Terminal) -> None:
    terminal.up()
    first = terminal.until_ready()
    os.kill(first["processes"][0]["pid"], signal.SIGKILL)
    second = terminal.until_ready(restarts=1)
    assert second["controller_address"] == first["controller_address"]
    registered = f"{second['controller_address']}/cluster"
    until(lambda: len(httpx.get(registered, trust_env=False).json()["workers"]) == 2)
    assert streamed(second)


def test_ctrl_c_stops_everything_within_ten_seconds(terminal: Terminal) -> None:
    """Even while an answer runs that would take much longer."""
    process = terminal.up(TWO_ECHOES.replace("0.02", "0.3"))
    status = terminal.until_ready()
    content = "ping" * 100
    body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": content}]}
    url = f"{status['controller_address']}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_S, trust_env=False) as answer:
        next(answer.iter_raw())
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        assert time.monotonic() - begun < 10
    assert gone(status)
    assert terminal.said.rstrip().endswith("Everything has stopped. Until next time.")


def test_ctrl_c_in_a_terminal(terminal: Terminal) -> None:
    """The live table, the calm one after it, and the key itself rather than a signal."""
    (terminal.folder / "cluster.yaml").write_text(TWO_ECHOES)
    screen, line = pty.openpty()
    takes_the_terminal = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", takes_the_terminal, *terminal.command("up", "cluster.yaml")],
        cwd=terminal.folder,
        env=terminal.environment | {"TERM": "xterm", "COLUMNS": "80"},
        stdin=line,
        stdout=line,
        stderr=line,
    )
    os.close(line)
    terminal.ups.append(process)
    shown = b""
    while b"Ctrl-C stops everything" not in shown:
        shown += os.read(screen, 4096)
    status = terminal.until_ready()
    os.write(screen, b"\x03")
    while b"Until next time" not in shown:
        shown += os.read(screen, 4096)
    assert process.wait(PATIENCE_S) == 0
    os.close(screen)
    assert gone(status)
    assert b"Traceback" not in shown


def test_a_killed_supervisor_leaves_no_orphans(terminal: Terminal) -> None:
    killed = terminal.up()
    first = terminal.until_ready()
    second_up = terminal.call("up", "cluster.yaml")
    assert second_up.returncode == 2
    assert "runs already" in second_up.stderr

    killed.kill()
    killed.wait()
    until(lambda: gone(first))
    stale = terminal.status()
    assert (stale["running"], stale["stale"]) == (False, True)
    assert "`python -m cluster down` cleans up" in terminal.call("status").stdout

    process = terminal.up()
    second = terminal.until_ready()
    assert set(pids(first)).isdisjoint(pids(second))
    process.terminate()
    assert process.wait(PATIENCE_S) == 0
    assert gone(second)


def test_down_after_a_killed_supervisor_forgets_it(terminal: Terminal) -> None:
    killed = terminal.up()
    first = terminal.until_ready()
    # Stopped, so that it cannot follow the kernel's SIGTERM: a survivor for `down`.
    os.kill(pids(first)[1], signal.SIGSTOP)
    killed.kill()
    killed.wait()
    until(lambda: "; echo-1 still runs; " in terminal.call("status").stdout)
    assert terminal.call("down").returncode == 0
    until(lambda: gone(first))
    assert terminal.status() == {"running": False, "ready": False, "stale": False}


def test_mistakes_are_one_sentence_and_exit_code_2(terminal: Terminal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for text, said in [
            (None, "There is no file"),
            ("workers: [{kind: echo, prot: 1}]", "line 1: workers[0].prot is not a known key"),
            (f"controller: {{port: {port}}}\nworkers: []", "another process has that port"),
        ]:
            if text is not None:
                (terminal.folder / "cluster.yaml").write_text(text)
            done = terminal.call("up", "cluster.yaml")
            assert done.returncode == 2
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1
            assert said in done.stderr


def test_help_and_example() -> None:
    for args, said in [(["up", "--help"], "Ctrl-C"), (["example"], "model-path:")]:
        done = subprocess.run(
            [sys.executable, "-m", "cluster", *args], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0
        assert said in done.stdout
