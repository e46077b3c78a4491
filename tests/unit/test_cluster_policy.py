"""When a process that ended is started again, and how its end is told."""

from __future__ import annotations

import signal

import pytest

from cluster.policy import (
    MAX_PAUSE_S,
    STABLE_AFTER_S,
    Exit,
    GiveUp,
    History,
    Restart,
    Verdict,
    after_exit,
    in_words,
)


def verdicts(*exits: Exit) -> list[Verdict]:
    history, found = History(), []
    for ended in exits:
        history, verdict = after_exit(history, ended)
        found.append(verdict)
    return found


def test_crashes_are_restarted_with_doubling_pauses_up_to_a_limit() -> None:
    pauses = [
        verdict.after_s
        for verdict in verdicts(*[Exit(-9, ready_for_s=1.0)] * 9)
        if isinstance(verdict, Restart)
    ]
    assert pauses == [1, 2, 4, 8, 16, 32, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]


def test_a_stable_run_forgets_earlier_crashes() -> None:
    crash, stable = Exit(70, ready_for_s=1.0), Exit(70, ready_for_s=STABLE_AFTER_S)
    assert verdicts(crash, crash, crash, stable, crash) == [
        Restart(1),
        Restart(2),
        Restart(4),
        Restart(1),
        Restart(2),
    ]


def test_refused_settings_are_given_up_at_once() -> None:
    (verdict,) = verdicts(Exit(2, ready_for_s=None))
    assert isinstance(verdict, GiveUp)


def test_three_failed_starts_in_a_row_are_given_up() -> None:
    failed = Exit(3, ready_for_s=None)
    first, second, third = verdicts(failed, failed, failed)
    assert (first, second) == (Restart(1), Restart(2))
    assert third == GiveUp("it failed to start 3 times in a row")


def test_a_start_that_works_forgets_failed_ones() -> None:
    failed, crash = Exit(3, ready_for_s=None), Exit(-11, ready_for_s=1.0)
    assert all(
        isinstance(verdict, Restart) for verdict in verdicts(failed, failed, crash, failed, failed)
    )


def test_a_clean_stop_is_respected() -> None:
    (verdict,) = verdicts(Exit(0, ready_for_s=5.0))
    assert isinstance(verdict, GiveUp)
    assert verdict.clean


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, "stopped cleanly (exit code 0)"),
        (1, "ended with an error (exit code 1)"),
        (2, "refused its settings (exit code 2)"),
        (3, "could not start (exit code 3)"),
        (70, "lost its engine (exit code 70)"),
        (-signal.SIGSEGV, "was killed by SIGSEGV (signal 11)"),
        (-signal.SIGKILL, "was killed by SIGKILL (signal 9; often the kernel, out of memory)"),
        (-60, "was killed by a signal (signal 60)"),
    ],
)
def test_an_exit_code_in_words(code: int, said: str) -> None:
    assert in_words(code) == said
