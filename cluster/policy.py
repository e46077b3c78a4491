"""What to do about a process that ended. Pure: no clock, no processes.

A worker whose settings are refused is given up at once, one that cannot start after
``MAX_FAILED_STARTS`` attempts in a row. One that ran and crashed is always restarted, after a
pause that doubles from ``FIRST_PAUSE_S`` to ``MAX_PAUSE_S`` and is forgotten once it has been
ready for ``STABLE_AFTER_S``.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from transport.exits import EXIT_ENGINE_DIED, EXIT_START_FAILED, EXIT_USAGE

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
STABLE_AFTER_S = 60.0
MAX_FAILED_STARTS = 3

EXIT_NOT_LAUNCHED = 126
"""Stands for: the operating system refused to start the process (the shells' number)."""


@dataclass(frozen=True, slots=True)
class Exit:
    """One end of a process. ``code`` is negative for a signal, as in ``subprocess``."""

    code: int
    ready_for_s: float | None  # None: it never became ready


@dataclass(frozen=True, slots=True)
class History:
    """What counts of a process's earlier ends."""

    failed_starts: int = 0  # in a row
    crashes: int = 0  # since it was last stable


@dataclass(frozen=True, slots=True)
class Restart:
    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    because: str
    clean: bool = False  # it was asked to stop, and did


Verdict = Restart | GiveUp


def after_exit(history: History, ended: Exit) -> tuple[History, Verdict]:
    """The verdict on ``ended``, and the history the next one is judged with."""
    if ended.code == 0:
        return history, GiveUp("it was asked to stop, so it is not restarted", clean=True)
    if ended.ready_for_s is None:
        failed = History(history.failed_starts + 1, history.crashes)
        if ended.code == EXIT_USAGE:
            return failed, GiveUp("its settings have to be corrected")
        if failed.failed_starts >= MAX_FAILED_STARTS:
            return failed, GiveUp(f"it failed to start {failed.failed_starts} times in a row")
        return failed, Restart(pause_s(failed.failed_starts))
    stable = ended.ready_for_s >= STABLE_AFTER_S
    crashed = History(0, 1 if stable else history.crashes + 1)
    return crashed, Restart(pause_s(crashed.crashes))


def pause_s(times: int) -> float:
    """Seconds to wait after failing ``times`` times (from 1)."""
    return float(min(FIRST_PAUSE_S * 2 ** min(times - 1, 30), MAX_PAUSE_S))


def in_words(code: int) -> str:
    """An exit code as the end of "the worker ..."."""
    if code < 0:
        hint = "; often the kernel, out of memory" if -code == signal.SIGKILL else ""
        return f"was killed by {_signal_name(-code)} (signal {-code}{hint})"
    words = {
        0: "stopped cleanly",
        EXIT_USAGE: "refused its settings",
        EXIT_START_FAILED: "could not start",
        EXIT_ENGINE_DIED: "lost its engine",
        EXIT_NOT_LAUNCHED: "could not be launched",
    }
    return f"{words.get(code, 'ended with an error')} (exit code {code})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "a signal"
