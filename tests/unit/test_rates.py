"""Token buckets, with a clock that the test turns."""

from __future__ import annotations

import pytest

from controller.rates import Bucket


def test_it_holds_a_minutes_worth_and_fills_at_that_rate() -> None:
    bucket = Bucket(60, 0.0)
    for _ in range(60):
        assert bucket.wait_s(1, 0.0) == 0
        bucket.take(1, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1)
    assert bucket.wait_s(1, 0.5) == pytest.approx(0.5)
    assert bucket.wait_s(1, 1.0) == 0
    assert bucket.wait_s(1, 10_000.0) == 0
    assert bucket.wait_s(61, 10_000.0) == pytest.approx(1)  # no more than a minute's worth


def test_what_was_used_beyond_it_is_a_debt() -> None:
    bucket = Bucket(100, 0.0)
    bucket.take(250, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(151 * 60 / 100)
    assert bucket.wait_s(1, 91.0) == 0


def test_asking_takes_nothing() -> None:
    bucket = Bucket(1, 0.0)
    assert [bucket.wait_s(1, 0.0) for _ in range(3)] == [0, 0, 0]
