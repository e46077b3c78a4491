"""Which replica gets a request: pure functions, the random source passed in.

Each takes the replicas that may serve the request and have room, at least one, and returns one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from controller.registry import Replica
from protocol.messages import GenerateRequest

CHARS_PER_TOKEN = 4  # the controller has no tokenizer; English averages about four

TYPICAL_ANSWER_TOKENS = 1024  # a limit far above says little of how long an answer will be

_MIN_SPEED = 1e-3  # tokens/s; a worker that measured nothing must not divide by zero


class Random(Protocol):
    """The part of ``random.Random`` that policies use."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


Policy = Callable[[Sequence[Replica], Random], Replica]


def work_of(request: GenerateRequest) -> float:
    """How much a request asks for, in tokens: prompt, images, and the answer within reason.

    Images count as 576 tokens each, LLaVA-1.5's figure, as replicas of one model agree on it and
    only ratios matter.
    """
    answer_tokens = max(0, request.max_new_tokens - len(request.resume_token_ids))
    return prompt_work(request) + min(answer_tokens, TYPICAL_ANSWER_TOKENS)


def prompt_work(request: GenerateRequest) -> float:
    """The part of its prompt and images in ``work_of``."""
    return request.prompt_chars / CHARS_PER_TOKEN + 576 * len(request.images)


def speeds_of(replicas: Sequence[Replica]) -> list[float]:
    """Tokens per second of each, never 0.

    LLaVA's and FastChat's workers all say 1, which is no measurement: beside workers that have
    measured theirs they count as the mean of those, and are not starved.
    """
    measured = [r.status.speed for r in replicas if r.status.protocol_version and r.status.speed]
    mean = sum(measured) / len(measured) if measured else None
    speeds = [r.status.speed if r.status.protocol_version else mean for r in replicas]
    return [
        max(replica.status.speed if speed is None else speed, _MIN_SPEED)
        for replica, speed in zip(replicas, speeds, strict=True)
    ]


def lottery(replicas: Sequence[Replica], random: Random) -> Replica:
    """In proportion to measured speed."""
    weights = speeds_of(replicas)
    drawn = random.random() * sum(weights)
    for replica, weight in zip(replicas, weights, strict=True):
        drawn -= weight
        if drawn < 0:
            return replica
    return replicas[-1]


def shortest_queue(replicas: Sequence[Replica], random: Random) -> Replica:
    """Least work ahead per unit of speed; ties at random, or one idle worker would get all."""
    ahead = [
        replica.inflight_work / speed
        for replica, speed in zip(replicas, speeds_of(replicas), strict=True)
    ]
    least = min(ahead)
    tied = [replica for replica, time_s in zip(replicas, ahead, strict=True) if time_s == least]
    return tied[int(random.random() * len(tied))]


POLICIES: dict[str, Policy] = {"lottery": lottery, "shortest_queue": shortest_queue}
