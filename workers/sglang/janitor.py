"""Removes what a server leaves when its worker is killed: ``python janitor.py GROUP``.

Reads paths, one a line, until its input ends, which it does with the worker, whatever that died
of. Then it kills what is left of the process group ``GROUP`` and removes the paths. It imports
next to nothing: one such process sits beside every worker that has started a server.
"""

import os
import signal
import sys
import time
from contextlib import suppress

PATIENCE_S = 1.0
"""How long the group, whose members die with their parents, may take to end by itself."""

LIMIT_S = 5.0
"""How long it may take to be gone after that: the dead may lie unburied in a container."""


def main() -> None:
    group = int(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    paths = [line.rstrip("\n") for line in sys.stdin]
    end(group)
    for path in paths:
        remove(path)


def end(group: int) -> None:
    """Return when nothing of ``group`` is left."""
    kill_at_s = time.monotonic() + PATIENCE_S
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        while time.monotonic() < kill_at_s + LIMIT_S:
            time.sleep(0.02)
            os.killpg(group, signal.SIGKILL if time.monotonic() > kill_at_s else 0)


def remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        from shutil import rmtree

        rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


if __name__ == "__main__":
    main()
