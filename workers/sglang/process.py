"""The SGLang server as a child process: started, watched, and gone without a trace."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from protocol.errors import EngineFailed, OutOfMemory, ServingError

log = logging.getLogger(__name__)

KEPT_LINES = 30
PREFIX = "tandem-sglang-"
POLL_S = 0.1
FRESH_S = 5.0  # a directory this young may be one that is just being made
STOP_S = 0.5
"""How long the server's children may take to follow it before they are killed as well."""

PHASES = (
    ("server_args=", "importing the model's code"),
    ("Load weight begin", "loading the weights"),
    ("Load weight end", "allocating the cache"),
    ("Capture", "capturing CUDA graphs"),
    ("Application startup complete", "warming up the server"),
)
"""What in a line of the server's log says which phase of its start begins."""

_ERROR = re.compile(
    r"^(?:\[[^\]]*\] )?(?:[\w.]+\.)?\w*(?:Error|Exception)\b.*|.*\b(?:error|out of memory)\b.*"
)


class ServerProcess:
    """One server and its children, in a session and a temporary directory of their own."""

    def __init__(self, directory: TemporaryDirectory) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=KEPT_LINES)
        self._progress: Callable[[str], None] | None = None
        self._phase = "starting"
        self._shared_memory: set[Path] = set()

    async def start(
        self, args: Sequence[str], environment: dict[str, str], progress: Callable[[str], None]
    ) -> None:
        """Start the server; its phases are reported to ``progress`` until ``ready``.

        Must run in the main thread: the server dies with the thread that started it.
        """
        self._progress = progress
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # never import from the working directory, where there may be a folder "sglang"
            "-m",
            "workers.sglang.server.launch",
            *args,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def ready(self) -> None:
        """The server answers: from here on its errors are worth a warning."""
        self._progress = None
        if self._process is not None:
            self._shared_memory = await asyncio.to_thread(_shared_memory, self._process.pid)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> None:
        """Return when the server has ended and its last words have been read."""
        assert self._reader is not None
        while self.running:  # noqa: ASYNC110 - Process.wait() waits for all who hold the pipe
            await asyncio.sleep(POLL_S)
        await asyncio.wait([self._reader], timeout=0.2)

    def failure(self) -> ServingError:
        """Why the server has ended, in one sentence; the lines before its end go to the log."""
        code = self._process.returncode if self._process is not None else None
        how = f"with code {code}"
        if code is not None and code < 0:
            how = f"by {signal.Signals(-code).name}"
        log.error("the last lines of the SGLang server:\n%s", "\n".join(self._tail))
        reason = explain(list(self._tail))
        when = "" if self._progress is None else f" while {self._phase}"
        sentence = f"The SGLang server ended {how}{when}{': ' + reason if reason else ''}."
        if "out of memory" in reason.lower():
            return OutOfMemory(sentence)
        if code == -signal.SIGKILL:
            return EngineFailed(
                sentence,
                remedy="If nobody killed it, the machine is out of memory: its kernel log says so.",
            )
        return EngineFailed(sentence)

    async def stop(self) -> None:
        """Kill the server and what it started, and remove what they leave; repeatable.

        It is killed outright: SIGTERM makes it wait without limit for its requests and then do
        the same to its children. They follow it, except one that removes its semaphores first.
        """
        if self._process is not None:
            group = self._process.pid
            with suppress(ProcessLookupError):
                self._process.kill()
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    while _group_exists(group):  # noqa: ASYNC110 - nothing tells when it ends
                        await asyncio.sleep(0.02)
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            await self._process.wait()
            self._process = None
        if self._reader is not None:
            # With its last writer gone the pipe ends, and so does the reader.
            await asyncio.wait([self._reader], timeout=STOP_S)
            self._reader.cancel()
            self._reader = None
        await asyncio.to_thread(self._remove_files)

    def _remove_files(self) -> None:
        for path in self._shared_memory:
            path.unlink(missing_ok=True)
        self._directory.remove()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Turn the server's output into entries of ours."""
        assert process.stdout is not None
        rest = ""
        while data := await process.stdout.read(65536):
            *lines, rest = re.split(r"[\r\n]+", rest + data.decode(errors="replace"))
            for line in lines:
                self._take(line.rstrip())
        self._take(rest)

    def _take(self, line: str) -> None:
        if not line:
            return
        self._tail.append(line)
        if self._progress is None:
            log.log(logging.WARNING if _ERROR.match(line) else logging.DEBUG, "server: %s", line)
            return
        log.debug("server: %s", line)
        words = next((words for text, words in PHASES if text in line), None)
        if words is not None and words != self._phase:
            self._phase = words
            self._progress(words)


def explain(lines: Sequence[str]) -> str:
    """The line that says best why a server has ended, cut to a sentence; "" if none does."""
    found = next((line for line in reversed(lines) if _ERROR.match(line)), "")
    found = re.sub(r"^\[[^\]]*\] ", "", found.strip())
    return found[:300].rstrip(". ")


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _shared_memory(group: int) -> set[Path]:
    """The load figures the processes of ``group`` share, which SGLang never removes."""
    found: set[Path] = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(directory.name)) == group:
                maps = (directory / "maps").read_text()
                found |= {Path(name) for name in re.findall(r"/dev/shm/sglang_loads_\S+", maps)}
    return found


class TemporaryDirectory:
    """A directory that is locked while its owner lives, so that the next one knows it is litter."""

    def __init__(self) -> None:
        """Make it, and remove those whose owners were killed; blocking."""
        base = Path(tempfile.gettempdir())
        for old in base.glob(f"{PREFIX}*"):
            _remove_if_abandoned(old)
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it; repeatable."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _remove_if_abandoned(path: Path) -> None:
    try:
        if time.time() - path.stat().st_ctime < FRESH_S:
            return
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone, or another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(lock)
