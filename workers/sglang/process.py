"""The SGLang server as a child process: started, watched, and gone without a trace."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from protocol.errors import EngineFailed, OutOfMemory, ServingError
from workers.sglang.request import WIRE_MARK

log = logging.getLogger(__name__)

KEPT_LINES = 30
PREFIX = "tandem-sglang-"
POLL_S = 0.1
LAST_WORDS_S = 0.2
FRESH_S = 5.0  # a directory this young may be one that is just being made
PARTS = "sglang::"
"""How the names of the server's own processes begin."""

SERVER = (
    sys.executable,
    "-P",  # never import from the working directory, where there may be a folder "sglang"
    "-m",
    "workers.sglang.server.launch",
)
# By its path and alone: it shall import nothing of ours.
JANITOR = (sys.executable, "-I", "-S", str(Path(__file__).with_name("janitor.py")))

STOP_S = 0.5
"""How long the server's children may take to follow it before they are killed as well."""

PHASES = (
    ("server_args=", "importing the model's code"),
    ("Load weight begin", "loading the weights"),
    ("Load weight end", "allocating the cache"),
    ("Capture", "capturing CUDA graphs"),
    ("Engine startup timings", "warming up the server"),
)
"""What in a line of the server's log says which phase of its start begins."""

SHARED = "/dev/shm"
SHARED_FILES = ("sglang_loads_*", "sem.mp-*")
"""SGLang's load figures, which it never removes, and Python's semaphores."""

_ERROR = re.compile(
    r"^(?:\[[^\]]*\] )?(?:[\w.]+\.)?\w*(?:Error|Exception)\b.*|.*\b(?:error|out of memory)\b.*"
)


class ServerProcess:
    """One server and its children, in a session and a temporary directory of their own."""

    def __init__(self, directory: TemporaryDirectory) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._janitor: asyncio.subprocess.Process | None = None
        self._parts: dict[int, str] = {}  # by descriptor, which tells when they end: their names
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
            *SERVER,
            *args,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read(self._process))
        self._janitor = await asyncio.create_subprocess_exec(
            *JANITOR,
            str(self._process.pid),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        self._leave_to_janitor(await asyncio.to_thread(self._directory.make))

    def _leave_to_janitor(self, path: str) -> None:
        assert self._janitor is not None
        assert self._janitor.stdin is not None
        self._janitor.stdin.write(f"{path}\n".encode())

    async def ready(self) -> None:
        """The server answers: from here on its errors are worth a warning."""
        self._progress = None
        self._tail.clear()  # what went wrong until now has not kept it from starting
        if self._process is not None:
            await self._find_shared_memory(self._process.pid)
            self._parts = await asyncio.to_thread(_open_parts, self._process.pid)

    async def _find_shared_memory(self, group: int) -> None:
        for path in await asyncio.to_thread(_shared_memory, group):
            if path not in self._shared_memory:
                self._shared_memory.add(path)
                self._leave_to_janitor(str(path))

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> None:
        """Return when the server, or a part of it, has ended and its last words have been read."""
        assert self._reader is not None
        # Process.wait() waits for all who hold the pipe.
        while self.running and not self._lost_parts():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        await asyncio.wait([self._reader], timeout=LAST_WORDS_S)

    def _lost_parts(self) -> list[str]:
        ended = select.poll()
        for descriptor in self._parts:
            ended.register(descriptor, select.POLLIN)
        return [self._parts[descriptor] for descriptor, _ in ended.poll(0)]

    def failure(self) -> ServingError:
        """Why the server has ended, in one sentence; the lines before its end go to the log."""
        code = self._process.returncode if self._process is not None else None
        who, how = "server", f"with code {code}"
        if code is None:  # a part of it, which is no child of ours: its code is not told
            lost = self._lost_parts()
            who, how = f"server's {lost[0] if lost else 'process'}", "suddenly"
        elif code < 0:
            how = f"by {signal.Signals(-code).name}"
        log.error("the last lines of the SGLang server:\n%s", "\n".join(self._tail))
        reason = explain(list(self._tail))
        when = "" if self._progress is None else f" while {self._phase}"
        sentence = f"The SGLang {who} ended {how}{when}{': ' + reason if reason else ''}."
        if "out of memory" in reason.lower():
            return OutOfMemory(sentence)
        if code == -signal.SIGKILL or (code is None and not reason):
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
        for descriptor in self._parts:
            os.close(descriptor)
        self._parts = {}
        if self._reader is not None:
            # With its last writer gone the pipe ends, and so does the reader.
            await asyncio.wait([self._reader], timeout=STOP_S)
            self._reader.cancel()
            self._reader = None
        await asyncio.to_thread(self._remove_files)
        if self._janitor is not None:
            with suppress(ProcessLookupError):
                self._janitor.kill()  # there is nothing left for it
            await self._janitor.wait()
            self._janitor = None

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
            phase = self._phase
            for line in lines:
                self._take(line.rstrip())
            if self._phase != phase and self._janitor is not None:
                await self._find_shared_memory(process.pid)
        self._take(rest)

    def _take(self, line: str) -> None:
        line = line.partition(WIRE_MARK)[0]  # what follows is for one client, and no log
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


def _members(group: int) -> Iterator[Path]:
    """The processes of ``group``, as directories of ``/proc``."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(directory.name)) == group:
                yield directory


def _open_parts(group: int) -> dict[int, str]:
    """The schedulers and helpers of the server: a descriptor of each process, and its name."""
    parts: dict[int, str] = {}
    for directory in _members(group):
        with suppress(OSError):
            # Its title: the system's own name for it is cut to 15 letters.
            title = (directory / "cmdline").read_bytes().partition(b"\0")[0].decode()
            if title.startswith(PARTS) and sys.platform == "linux":
                parts[os.pidfd_open(int(directory.name))] = title.removeprefix(PARTS)
    return parts


def _shared_memory(group: int) -> set[Path]:
    """What the processes of ``group`` share and do not remove when they are killed.

    A semaphore is mapped under the name it had before it got its own, so by its inode.
    """
    inodes: set[int] = set()
    for directory in _members(group):
        with suppress(OSError):
            for line in (directory / "maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{SHARED}/"):
                    inodes.add(int(fields[4]))
    found: set[Path] = set()
    for pattern in SHARED_FILES:
        for path in Path(SHARED).glob(pattern):
            with suppress(OSError):
                if path.stat().st_ino in inodes:
                    found.add(path)
    return found


class TemporaryDirectory:
    """A directory that is locked while its owner lives, so that the next one knows it is litter.

    Safe to use from several threads, which may be left over from a start that was given up.
    """

    def __init__(self) -> None:
        self._path = ""
        self._lock = -1
        self._removed = False
        self._changing = threading.Lock()

    def make(self) -> str:
        """Its path. The first call makes it, and removes those whose owners were killed; blocking.

        Raises:
            EngineFailed: it has been removed.
        """
        with self._changing:
            if self._removed:
                raise EngineFailed("The worker was stopped while it started.")
            if not self._path:
                base = Path(tempfile.gettempdir())
                for old in base.glob(f"{PREFIX}*"):
                    _remove_if_abandoned(old)
                self._path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
                self._lock = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            return self._path

    def remove(self) -> None:
        """Remove it for good; repeatable."""
        with self._changing:
            self._removed = True
            if self._lock >= 0:
                shutil.rmtree(self._path, ignore_errors=True)
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
