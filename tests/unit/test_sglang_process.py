"""The server process without a server: its directory, its last words, its end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from protocol.errors import EngineFailed, InvalidRequest, OutOfMemory
from tests.processes import ROOT, until
from workers.sglang import process
from workers.sglang.process import ServerProcess, TemporaryDirectory, explain
from workers.sglang.request import wire_text


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(process, "FRESH_S", 0.0)
    return tmp_path


def test_a_directory_whose_owner_was_killed_is_removed(base: Path) -> None:
    litter = base / "tandem-sglang-dead"
    (litter / "sub").mkdir(parents=True)
    mine = TemporaryDirectory()
    assert mine.make() == mine.make()
    assert not litter.exists()
    mine.remove()
    mine.remove()
    assert list(base.iterdir()) == []


def test_what_a_start_that_was_given_up_asks_for_is_not_made(base: Path) -> None:
    given_up = TemporaryDirectory()
    given_up.remove()
    with pytest.raises(EngineFailed, match="was stopped"):
        given_up.make()
    assert list(base.iterdir()) == []


def test_a_directory_whose_owner_lives_stays(base: Path) -> None:
    other = base / "tandem-sglang-alive"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    TemporaryDirectory().make()
    assert other.exists()
    os.close(lock)


def test_a_young_directory_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FRESH_S", 60.0)
    young = base / "tandem-sglang-young"
    young.mkdir()
    TemporaryDirectory().make()
    assert young.exists()


def test_what_a_client_sent_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    refused = wire_text(InvalidRequest("The regex secret( is wrong."))
    directory = TemporaryDirectory()
    with caplog.at_level("DEBUG"):
        ServerProcess(directory)._take(f"Error: Failed to compile json grammar: {refused}")
    directory.remove()
    assert "Failed to compile" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["[2026-11-20 10:15:46] ValueError: no such model.", "rc"], "ValueError: no such model"),
        (["torch.OutOfMemoryError: CUDA out of memory.", "x"],
         "torch.OutOfMemoryError: CUDA out of memory"),
        (["launch.py: error: unrecognized arguments: --x"],
         "launch.py: error: unrecognized arguments: --x"),
        (["all is well"], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_the_line_that_explains(lines: list[str], reason: str) -> None:
    assert explain(lines) == reason


async def started(code: str, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> ServerProcess:
    script = Path(tempfile.gettempdir()) / "fake"
    script.write_text(f"#!{sys.executable}\n{code}")
    script.chmod(0o755)
    monkeypatch.setattr(process, "SERVER", [str(script)])
    server = ServerProcess(TemporaryDirectory())
    await server.start([], dict(os.environ), words.append)
    return server


@pytest.mark.anyio
async def test_it_says_why_it_could_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    code = "print('Load weight begin'); raise ValueError('a bad file')"
    server = await started(code, monkeypatch, words)
    await server.wait()
    failure = server.failure()
    assert words == ["loading the weights"]
    assert isinstance(failure, EngineFailed)
    assert failure.message == (
        "The SGLang server ended with code 1 while loading the weights: ValueError: a bad file."
    )
    await server.stop()


@pytest.mark.anyio
async def test_too_little_memory_has_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    server = await started("raise SystemExit('RuntimeError: out of memory')", monkeypatch, [])
    await server.wait()
    assert isinstance(server.failure(), OutOfMemory)
    await server.stop()


@pytest.mark.anyio
async def test_stopping_ends_the_children_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_S", 0.2)
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print('Load weight begin', child.pid, flush=True); time.sleep(60)"
    )
    words: list[str] = []
    server = await started(code, monkeypatch, words)
    while not words:  # noqa: ASYNC110 - the fake has no event to wait for
        await asyncio.sleep(0.01)
    child = psutil.Process(int(server._tail[0].split()[-1]))
    assert server.running
    await server.stop()
    await server.stop()
    assert not server.running
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert [path.name for path in base.iterdir()] == ["fake"]  # noqa: ASYNC240


PART = (
    "import subprocess, time\n"
    "part = subprocess.Popen(['sglang::scheduler', '60'], executable='/bin/sleep')\n"
    "print('Load weight begin', part.pid, flush=True); time.sleep(60)"
)


@pytest.mark.anyio
async def test_the_death_of_a_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    server = await started(PART, monkeypatch, words)
    while not words:  # noqa: ASYNC110 - the fake has no event to wait for
        await asyncio.sleep(0.01)
    part = psutil.Process(int(server._tail[0].split()[-1]))
    await server.ready()
    waiting = asyncio.create_task(server.wait())
    assert server.running
    part.kill()
    await asyncio.wait_for(waiting, 2)
    assert server.running, "the part's parent has not even looked"
    failure = server.failure()
    assert failure.message == "The SGLang server's scheduler ended suddenly."
    assert "out of memory" in failure.remedy
    await server.stop()


# A worker with a server, which prints the server's process id and its directory.
WORKER = """
import asyncio, os, sys
from workers.sglang import process
from workers.sglang.process import ServerProcess, TemporaryDirectory

async def main():
    directory = TemporaryDirectory()
    process.SERVER = [sys.executable, "-c", "import time; print('up'); time.sleep(60)"]
    server = ServerProcess(directory)
    await server.start([], dict(os.environ), lambda words: None)
    print(server._process.pid, server._janitor.pid, directory.make(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_leaves_nothing(base: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(base), "PYTHONPATH": str(ROOT)},
    ) as worker:
        assert worker.stdout is not None
        server, janitor, path = worker.stdout.readline().split()
        assert Path(path).is_dir()
        worker.send_signal(number)
    until(lambda: not Path(path).exists(), what="the directory is gone")
    until(lambda: gone(int(server)) and gone(int(janitor)), what="server and janitor are gone")
    assert list(base.iterdir()) == []


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_janitor_removes_files_and_folders(base: Path) -> None:
    folder, file, absent = base / "a folder", base / "file", base / "absent"
    folder.mkdir()
    (folder / "part").touch()
    file.touch()
    dead = subprocess.Popen(["true"], start_new_session=True)
    dead.wait()
    subprocess.run(
        [*process.JANITOR, str(dead.pid)],
        input=f"{folder}\n{file}\n{absent}\n",
        text=True,
        check=True,
        timeout=10,
    )
    assert list(base.iterdir()) == []


@pytest.mark.anyio
async def test_what_it_shares_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import mmap, multiprocessing, time\n"
        "lock = multiprocessing.get_context('spawn').Lock()\n"
        "file = open(f'/dev/shm/sglang_loads_{__import__(\"os\").getpid()}.shm', 'w+b')\n"
        "file.truncate(64); kept = mmap.mmap(file.fileno(), 64)\n"
        "print('Load weight begin', file.name, lock._semlock.name, flush=True); time.sleep(60)"
    )
    words: list[str] = []
    server = await started(code, monkeypatch, words)
    while not words:  # noqa: ASYNC110 - the fake has no event to wait for
        await asyncio.sleep(0.01)
    loads, semaphore = server._tail[0].split()[-2:]
    shared = {Path(loads), Path(f"/dev/shm/sem.{semaphore.removeprefix('/')}")}
    await server.ready()
    assert server._shared_memory == shared
    await server.stop()
    assert not any(path.exists() for path in shared)
