"""Ties a process to its supervisor, then becomes it: ``python -m cluster.tether PID ARGS...``.

A program of its own, because code between fork and exec is not safe in a process with threads.
It imports next to nothing: every start of a process waits for it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor_pid, *args = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() == int(supervisor_pid):  # else it died before the kernel was told
        os.execv(sys.executable, [sys.executable, *args])


if __name__ == "__main__":
    main()
