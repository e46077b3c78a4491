"""The server process without a server: its directory, its last words, its end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from protocol.errors import EngineFailed, OutOfMemory
from workers.sglang import process
from workers.sglang.process import ServerProcess, TemporaryDirectory, explain


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(process, "FRESH_S", 0.0)
    return tmp_path


def test_a_directory_whose_owner_was_killed_is_removed(base: Path) -> None:
    litter = base / "tandem-sglang-dead"
    (litter / "sub").mkdir(parents=True)
    mine = TemporaryDirectory()
    assert not litter.exists()
    mine.remove()
    mine.remove()
    assert list(base.iterdir()) == []


def test_a_directory_whose_owner_lives_stays(base: Path) -> None:
    other = base / "tandem-sglang-alive"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    TemporaryDirectory().remove()
    assert other.exists()
    os.close(lock)


def test_a_young_directory_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FRESH_S", 60.0)
    young = base / "tandem-sglang-young"
    young.mkdir()
    TemporaryDirectory().remove()
    assert young.exists()


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
    monkeypatch.setattr(sys, "executable", str(script))
    server = ServerProcess(await asyncio.to_thread(TemporaryDirectory))
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
