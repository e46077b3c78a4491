"""The log of one child: a file of limited size, and its last lines in memory."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

MAX_BYTES = 16 << 20
TAIL_LINES = 50

_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class LogFile:
    """Appends to ``path``; at ``max_bytes`` the file becomes ``path.1`` and a new one begins.

    A full or failing disk loses log lines, never the caller.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes

    def rotate(self) -> None:
        """Put what is there aside, as ``path.1``."""
        try:
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        except OSError:  # nothing to put aside, or no right to: then it is appended to
            return

    def write(self, data: bytes) -> None:
        """Append; blocking, so call it in a thread."""
        try:
            # Opened each time: a file that was removed, or a disk that was full, is no matter.
            with self.path.open("ab") as file:
                file.write(data)
                size = file.tell()
        except OSError:
            return
        if size >= self._max_bytes:
            self.rotate()


class Tail:
    """The last lines of a byte stream, fit for a terminal."""

    def __init__(self, lines: int = TAIL_LINES) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-65536:]
        for line in lines:
            self._add(line)

    def last(self, count: int) -> list[str]:
        """Up to ``count`` of the newest lines that are not blank."""
        unfinished = _readable(self._rest)
        lines = [*self._lines, unfinished] if unfinished else list(self._lines)
        return lines[-count:]

    def clear(self) -> None:
        self._lines.clear()
        self._rest = b""

    def _add(self, line: bytes) -> None:
        text = _readable(line)
        if text:
            self._lines.append(text)


def _readable(line: bytes) -> str:
    """Without colours, and of a progress bar only what stood there last."""
    text = _ESCAPE.sub("", line.decode("utf-8", "replace")).rstrip()
    return _UNPRINTABLE.sub(" ", text.rsplit("\r", 1)[-1])[:500].rstrip()
