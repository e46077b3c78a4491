"""Tokens a second and times to the first token, from answers and their times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.client import Answer
from bench.results import quantile, spread


@dataclass(frozen=True, slots=True)
class Measured:
    """Some waves of requests; the requests of a wave were sent at once.

    ``rate`` is tokens a second from a wave's first token to its last, ``rate_from_sending`` from
    its sending. ``short`` answers ended by themselves, ``failed`` ones with an error.
    """

    rate: float
    rate_from_sending: float
    ttft_s: tuple[float, ...]
    tokens: int
    short: int
    failed: int


def measured(waves: Sequence[Sequence[Answer]]) -> Measured:
    """The figures of some waves.

    Raises:
        ValueError: no wave brought two tokens at different times.
    """
    tokens = gaps = 0
    window_s = whole_s = 0.0
    for wave in waves:
        times = [at for answer in wave for at in answer.token_at]
        if not times:
            continue
        tokens += len(times)
        gaps += len(times) - 1  # the first token opens the window
        window_s += max(times) - min(times)
        whole_s += max(times) - min(answer.sent_at for answer in wave)
    if window_s <= 0:
        raise ValueError("no tokens came")
    answers = [answer for wave in waves for answer in wave]
    return Measured(
        rate=gaps / window_s,
        rate_from_sending=tokens / whole_s,
        ttft_s=tuple(answer.ttft_s for answer in answers if answer.ttft_s is not None),
        tokens=tokens,
        short=sum(answer.end == "stop" for answer in answers),
        failed=sum(answer.end not in ("stop", "length") for answer in answers),
    )


def summary(found: Sequence[Measured]) -> dict[str, Any]:
    """The figures of the same measurement in several rounds."""
    ttft_s = [value for one in found for value in one.ttft_s]
    return {
        "tokens_per_s": spread([one.rate for one in found]),
        "tokens_per_s_from_sending": spread([one.rate_from_sending for one in found]),
        "ttft_s": {"median": statistics.median(ttft_s), "p95": quantile(ttft_s, 0.95)},
        "requests": len(ttft_s),
        "short": sum(one.short for one in found),
        "failed": sum(one.failed for one in found),
    }


def shown_rate(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    rate = side["tokens_per_s"]
    return f"{rate['median']:.0f} ({rate['min']:.0f}-{rate['max']:.0f})"


def shown_ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def shown_ttft(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    return f"{side['ttft_s']['median'] * 1e3:.0f}, {side['ttft_s']['p95'] * 1e3:.0f}"
