"""Policies are functions of replicas and a random source."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from controller.policy import lottery, shortest_queue, speeds_of, work_of
from controller.registry import Replica
from protocol.messages import GenerateRequest
from tests.unit.fakes import status


def replica(name: str, speed: float = 10.0, work: float = 0.0) -> Replica:
    return Replica(name, status(worker_id=name, speed=speed), None, 0.0, inflight_work=work)


def test_lottery_draws_in_proportion_to_speed() -> None:
    random = Random(1)
    replicas = [replica("slow", 100), replica("fast", 300)]
    drawn = Counter(lottery(replicas, random).address for _ in range(10_000))
    assert drawn["fast"] / drawn["slow"] == pytest.approx(3, rel=0.1)


def test_shortest_queue_weighs_work_by_speed() -> None:
    slow, fast = replica("slow", 10, work=100), replica("fast", 100, work=900)
    assert shortest_queue([slow, fast], Random(1)) is fast
    assert shortest_queue([fast, slow], Random(1)) is fast


def test_shortest_queue_breaks_ties_at_random() -> None:
    random = Random(1)
    replicas = [replica(name) for name in "abc"]
    drawn = Counter(shortest_queue(replicas, random).address for _ in range(3000))
    assert all(800 < count < 1200 for count in drawn.values())


@pytest.mark.parametrize("policy", [lottery, shortest_queue])
def test_a_speed_of_zero_is_survived(policy: object) -> None:
    assert callable(policy)
    assert policy([replica("a", 0), replica("b", 0)], Random(1)).address in "ab"


def test_work_counts_text_images_and_answer() -> None:
    plain = GenerateRequest(model="m", prompt="a" * 400, max_new_tokens=50)
    assert work_of(plain) == 150
    image = GenerateRequest(model="m", prompt="<image>", images=("x",), max_new_tokens=50)
    assert work_of(image) > 576 + 50
    resumed = GenerateRequest(
        model="m", prompt="a" * 400, max_new_tokens=50, resume_token_ids=(1, 2)
    )
    assert work_of(resumed) == 148


def test_a_worker_that_measures_nothing_counts_as_the_mean_of_those_that_do() -> None:
    llava = Replica("llava", status(speed=1, protocol_version=0), None, 0.0)
    assert speeds_of([replica("a", 10), llava, replica("b", 30)]) == [10, 20, 30]
    assert speeds_of([llava, llava]) == [1, 1], "as they say, where there is nothing better"
    assert speeds_of([replica("new", 0), llava, replica("b", 30)]) == [1e-3, 30, 30]
