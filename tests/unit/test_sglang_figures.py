"""What SGLang says of its load, as figures of ours. The answers are those of 0.5.23."""

from __future__ import annotations

from typing import Any

import pytest

from workers.sglang.figures import CacheCount, Load, load_of, tokens_per_s


def rank(**fields: Any) -> dict[str, Any]:
    return {
        "timestamp": 1.5,
        "num_running_reqs": 2,
        "num_waiting_reqs": 1,
        "num_used_tokens": 100,
        "total_prefill_uncached_tokens": 766,
        "total_prefill_busy_us": 500_000,
        "decode_moments": [10.0, 20.0, 1_500_000.0, 40.0, 3_000_000.0, 21.0],
        "queues": {"waiting": 1, "grammar": 3},
    } | fields


def test_the_schedulers_are_taken_together() -> None:
    load = load_of({"loads": [rank(), rank(timestamp=2.5, num_used_tokens=11)]})
    assert load.steps == (1.5, 2.5)
    assert load.requests == (6, 6)
    assert (load.running, load.waiting) == (4, 8)
    assert load.held_tokens == 111
    assert (load.decoded_tokens, load.busy_s) == (42.0, 4.0)


def test_a_server_that_has_not_decoded_yet() -> None:
    load = load_of({"loads": [rank(decode_moments=None)]})
    assert (load.decoded_tokens, load.busy_s) == (0.0, 0.5)


@pytest.mark.parametrize(
    "answer",
    [{}, {"loads": [{}]}, {"loads": None}, {"loads": [rank(queues=1)]}, {"loads": ["busy"]}],
)
def test_another_server_is_told_from_sglang(answer: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, LookupError, TypeError)):
        load_of(answer)


def at(tokens: float, busy_s: float) -> Load:
    return Load((0.0,), (0,), 0, 0, 0, decoded_tokens=tokens, busy_s=busy_s)


def test_the_speed_is_that_while_busy() -> None:
    assert tokens_per_s(at(100, 2.0), at(200, 4.0)) == 50.0
    assert tokens_per_s(at(100, 2.0), at(100, 2.0)) is None
    assert tokens_per_s(at(100, 2.0), at(103, 2.1)) is None, "too few to tell"


def test_a_server_of_ours_says_itself_what_its_cache_holds() -> None:
    cache = CacheCount(100)
    cache.count(60, 15, 10)
    assert cache.status(held_tokens=33).used_tokens == 33
    assert cache.status(held_tokens=33).hit_rate == 0.25


def test_a_flushed_cache_is_empty() -> None:
    cache = CacheCount(100)
    cache.count(60, 15, 10)
    cache.flushed()
    assert cache.status().used_tokens == 0
    assert cache.status().hit_rate == 0.25, "what was asked stays asked"
