"""The life of the SGLang worker with a real server: that it hangs is noticed, and its memory."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol.events import Failed
from tests.contract.conftest import START_TIMEOUT_S
from tests.process.test_processes import call
from tests.processes import running, until
from tests.streams import streaming, user
from transport.exits import EXIT_ENGINE_DIED, EXIT_START_FAILED, EXIT_USAGE

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)


def test_a_scheduler_that_hangs_is_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    flags = ("--port", "0", "--no-register", "--device", "cpu", "--dtype", "float32")
    hang = ("--hang-timeout-s", "5", "--health-interval-s", "1")
    with running(
        tmp_path, "workers.sglang", *flags, *hang, env={"TMPDIR": str(tmp_path)}
    ) as worker:
        address = worker.wait_ready(START_TIMEOUT_S)

        def token_age_s() -> float:
            found: float = httpx.get(f"{address}/healthz").json()["token_age_s"]
            return found

        until(lambda: token_age_s() > 0.8, what="it is idle for a while")
        until(lambda: token_age_s() < 0.5, what="it has been asked for a token")
        family = psutil.Process(worker.pid).children(recursive=True)
        scheduler = next(child for child in family if child.cmdline()[0] == "sglang::scheduler")
        asked: dict[str, Any] = {"model": "pocket-llava", "messages": user("Count from 1 to 100.")}
        with streaming(address, **asked, temperature=0, max_new_tokens=3000) as events:
            next(events)
            scheduler.suspend()
            last = list(events)[-1]
        assert isinstance(last, Failed)
        assert last.code == "engine_failed"
        assert "has done nothing for 5 s" in last.message
        assert worker.wait() == EXIT_ENGINE_DIED
    until(lambda: not any(child.is_running() for child in family), what="nothing runs on")
    assert not list(tmp_path.glob("tandem-sglang-*"))


def test_a_cache_too_large_for_the_machine_is_a_sentence(tmp_path: Path) -> None:
    flags = ("--port", "0", "--no-register", "--device", "cpu", "--max-cached-tokens", "999999999")
    with running(tmp_path, "workers.sglang", *flags, env={"TMPDIR": str(tmp_path)}) as worker:
        assert worker.wait(60) == EXIT_START_FAILED
        assert "A cache of 999999999 tokens takes" in worker.tail()
        assert "Traceback" not in worker.tail()
    assert not list(tmp_path.glob("tandem-sglang-*"))


def test_a_part_needs_to_know_where_the_first_machine_is() -> None:
    found = call("workers.sglang", "--nnodes", "2", "--node-rank", "1")
    assert found.returncode == EXIT_USAGE
    assert "--nnodes needs --dist-init-addr" in found.stderr


def test_a_part_ends_on_a_signal(tmp_path: Path) -> None:
    """Machine 0 never comes; the second signal does not wait for it."""
    flags = ("--device", "cpu", "--nnodes", "2", "--node-rank", "1")
    where = ("--dist-init-addr", "127.0.0.1:1")
    with running(tmp_path, "workers.sglang", *flags, *where, env={"TMPDIR": str(tmp_path)}) as part:
        until(lambda: "starting the SGLang server" in part.tail(), what="it starts")
        family = psutil.Process(part.pid).children(recursive=True)
        part.signal(signal.SIGTERM)
        assert part.wait() == 0
    until(lambda: not any(child.is_running() for child in family), what="nothing runs on")
    assert not list(tmp_path.glob("tandem-sglang-*"))
