"""Real `python -m ...`: flags, signals and exit codes, as a person or a supervisor meets them."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from protocol.events import Failed
from tests.processes import ROOT, Process, running, until, wait_workers, workers_of
from tests.streams import ask, refusal, streaming
from transport.exits import EXIT_ENGINE_DIED, EXIT_START_FAILED, EXIT_USAGE

pytestmark = pytest.mark.timeout(120)

MODULES = ["controller", "workers.echo", "workers.hf", "workers.sglang", "cluster"]


def call(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("module", MODULES)
def test_help(module: str) -> None:
    found = call(module, "--help")
    assert found.returncode == 0
    assert f"python -m {module}" in found.stdout
    assert len(found.stdout.splitlines()) > 10


@pytest.mark.parametrize("module", MODULES)
def test_a_mistake_is_a_sentence_and_exit_code_2(module: str) -> None:
    found = call(module, "--no-such-flag")
    assert found.returncode == EXIT_USAGE
    assert "Traceback" not in found.stderr
    assert "--no-such-flag" in found.stderr or "usage" in found.stderr


@pytest.mark.parametrize("module", ["controller", "workers.echo"])
def test_a_taken_port_is_a_sentence(tmp_path: Path, module: str) -> None:
    with running(tmp_path, "workers.echo", "--port", "0", "--no-register") as first:
        port = first.wait_ready().rsplit(":", 1)[1]
        found = call(module, "--port", port)
        assert found.returncode == EXIT_USAGE
        assert f"127.0.0.1:{port} is taken by another process" in found.stderr
        assert "Traceback" not in found.stderr


def test_two_workers_without_a_port_take_two(tmp_path: Path) -> None:
    with (
        running(tmp_path, "workers.echo", "--no-register") as one,
        running(tmp_path, "workers.echo", "--no-register") as two,
    ):
        assert one.wait_ready() != two.wait_ready()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    flags = ("--port", "0", "--no-register", "--delay-s", "0.02")
    with running(tmp_path, "workers.echo", *flags) as worker:
        address = worker.wait_ready()
        with streaming(address, model="echo", prompt="x" * 40, max_new_tokens=100) as events:
            next(events)
            worker.signal(number)
            until(lambda: httpx.get(f"{address}/healthz").status_code == 503, what="it is draining")
            assert refusal(address, model="echo", prompt="a")[1]["code"] == "draining"
            assert len(list(events)) == 41  # 39 letters, the end, and the last word
        assert worker.wait() == 0
        assert "Traceback" not in worker.tail()


def test_the_second_signal_does_not_wait(tmp_path: Path) -> None:
    flags = ("--port", "0", "--no-register", "--delay-s", "0.1")
    with running(tmp_path, "workers.echo", *flags) as worker:
        address = worker.wait_ready()
        with streaming(address, model="echo", prompt="x" * 999, max_new_tokens=999) as events:
            next(events)
            worker.signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{address}/healthz").status_code == 503)
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0


def test_an_engine_that_dies_ends_the_worker_with_its_own_code(tmp_path: Path) -> None:
    with running(tmp_path, "controller", "--port", "0") as controller:
        front = controller.wait_ready()
        flags = ("--port", "0", "--controller-address", front, "--die-after", "40")
        with running(tmp_path, "workers.echo", *flags) as worker:
            worker.wait_ready()
            wait_workers(front, 1)
            answer = ask(front, model="echo", prompt="x" * 100, max_new_tokens=100)
            assert isinstance(answer.events[-1], Failed)
            assert answer.failed.code == "engine_failed"
            assert worker.wait() == EXIT_ENGINE_DIED
        until(lambda: not workers_of(front), what="the controller has noticed")


def test_a_model_that_is_not_there_is_a_sentence_and_exit_code_3(tmp_path: Path) -> None:
    found = call("workers.hf", "--no-register", "--port", "0", "--model-path", str(tmp_path / "no"))
    assert found.returncode == EXIT_START_FAILED
    assert "could not start" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_worker_waits_for_its_controller(tmp_path: Path) -> None:
    """Started in any order."""
    with running(tmp_path, "controller", "--port", "0") as first:
        front = first.wait_ready()
    with running(tmp_path, "workers.echo", "--port", "0", "--controller-address", front) as worker:
        worker.wait_ready()
        until(lambda: "not registered" in worker.tail(), what="it says that it waits")
        port = front.rsplit(":", 1)[1]
        with running(tmp_path, "controller", "--port", port) as controller:
            controller.wait_ready()
            wait_workers(front, 1)
            assert ask(front, model="echo", prompt="hello").text == "hello"


def test_killing_a_worker_with_requests_waiting_for_it(tmp_path: Path) -> None:
    """Requests before their first token go to the other worker, unseen by their clients."""
    with running(tmp_path, "controller", "--port", "0") as controller:
        front = controller.wait_ready()
        common = ("--port", "0", "--controller-address", front)
        flags = (*common, "--worker-id", "hung", "--limit-model-concurrency", "8")
        with running(tmp_path, "workers.echo", *flags) as victim:
            victim.wait_ready()
            wait_workers(front, 1)
            victim.signal(signal.SIGSTOP)
            with ThreadPoolExecutor(5) as pool:
                answers = [pool.submit(ask, front, model="echo", prompt="here") for _ in range(5)]
                until(lambda: workers_of(front)["hung"]["inflight"] == 5, what="all dispatched")
                with running(tmp_path, "workers.echo", *common) as rescue:
                    rescue.wait_ready()
                    wait_workers(front, 2)
                    victim.kill()
                    assert {answer.result().text for answer in answers} == {"here"}


def test_logs_never_hold_the_conversation(tmp_path: Path) -> None:
    with running(tmp_path, "controller", "--port", "0", "--log-level", "DEBUG") as controller:
        front = controller.wait_ready()
        flags = ("--port", "0", "--controller-address", front, "--log-level", "DEBUG")
        with running(tmp_path, "workers.echo", *flags) as worker:
            worker.wait_ready()
            wait_workers(front, 1)
            ask(front, model="echo", prompt="the secret is swordfish")
            refusal(front, model="echo", prompt="swordfish", logprobs=2)
            refusal(front, b'{"model": "echo", "prompt": "swordfish", "top_p": 9}')
            logs: list[Process] = [controller, worker]
            for process in logs:
                entries = [e for e in process.entries() if e["event"] == "finished"]
                assert entries
                assert "swordfish" not in process.log.read_text()
