"""The speed a worker measures of itself."""

from __future__ import annotations

import pytest

from tests.unit.fakes import Clock
from workers.speed import SpeedMeter


def serve(meter: SpeedMeter, clock: Clock, *, tokens: int, seconds: float) -> None:
    meter.begin()
    for _ in range(tokens):
        clock.now += seconds / tokens
        meter.count(1)
    meter.end()


def test_nothing_measured_is_llavas_constant() -> None:
    assert SpeedMeter(Clock()).tokens_per_s == 1.0


def test_a_short_warm_up_seeds_it() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    serve(meter, clock, tokens=24, seconds=0.5)
    assert meter.tokens_per_s == pytest.approx(48)


def test_idle_time_does_not_count() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    for _ in range(3):
        serve(meter, clock, tokens=50, seconds=0.5)
        clock.now += 1000
    assert meter.tokens_per_s == pytest.approx(100)


def test_it_counts_all_requests_together() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    for _ in range(4):
        meter.begin()
    for _ in range(50):
        clock.now += 0.01
        for _ in range(4):
            meter.count(1)
    for _ in range(4):
        meter.end()
    assert meter.tokens_per_s == pytest.approx(400)


def test_it_follows_a_change() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    for _ in range(20):
        serve(meter, clock, tokens=100, seconds=1)
    for _ in range(20):
        serve(meter, clock, tokens=20, seconds=1)
    assert meter.tokens_per_s == pytest.approx(20, rel=0.05)


def test_a_blink_is_noise() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    serve(meter, clock, tokens=1, seconds=0.001)
    assert meter.tokens_per_s == 1.0
