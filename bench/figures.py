"""From timelines to figures: plain functions, in the words of the glossary.

TTFT   from sending a request to its first delta with text
ITL    the gap between two deltas, each gap for itself; a delta may hold several tokens
TPOT   (duration - TTFT) / (output tokens - 1), a request
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.results import quantile, spread
from bench.wire import Reply

SHARES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
LATENCIES = ("ttft_s", "itl_s", "tpot_s", "duration_s")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must meet to be good: its TTFT, and 95 % of its own gaps."""

    ttft_s: float
    itl_s: float


def itl_s(reply: Reply) -> list[float]:
    """The gaps between the deltas of one answer."""
    return [later - earlier for earlier, later in pairwise(reply.delta_at)]


def tpot_s(reply: Reply) -> float | None:
    """Time per further token; ``None`` for an answer of one token, or without text."""
    if reply.ttft_s is None or reply.output_tokens < 2:
        return None
    return (reply.duration_s - reply.ttft_s) / (reply.output_tokens - 1)


def is_good(reply: Reply, limits: Limits) -> bool:
    """Whether an answer met ``limits``; a refusal, a failure or silence never does."""
    if not reply.answered or reply.ttft_s is None or reply.ttft_s > limits.ttft_s:
        return False
    gaps = itl_s(reply)
    return not gaps or quantile(gaps, SHARES["p95"]) <= limits.itl_s


def quantiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """p50 to p99 of those that are there; ``None`` if none is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return {name: quantile(there, share) for name, share in SHARES.items()}


def window_s(replies: Sequence[Reply]) -> float:
    """From the first sending to the last end.

    Raises:
        ValueError: there are no replies.
    """
    return max(r.ended_at for r in replies) - min(r.sent_at for r in replies)


def figures(replies: Sequence[Reply], limits: Limits) -> dict[str, Any]:
    """The figures of one run. Every request counts somewhere: answered, refused or failed.

    Rates are of answered requests over the whole window; latencies of answered requests only.

    Raises:
        ValueError: there are no replies.
    """
    seconds = window_s(replies)
    answered = [reply for reply in replies if reply.answered]
    output = sum(reply.output_tokens for reply in answered)
    prompts = [reply.prompt_tokens for reply in answered]
    known = [count for count in prompts if count is not None]
    deltas = sum(len(reply.delta_at) for reply in answered)
    good = sum(is_good(reply, limits) for reply in answered)
    return {
        "requests": len(replies),
        "answered": len(answered),
        "refused": dict(Counter(reply.code for reply in replies if reply.end == "refused")),
        "failed": dict(Counter(reply.code for reply in replies if reply.end == "failed")),
        "window_s": seconds,
        "requests_per_s": len(answered) / seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (output + sum(known)) / seconds
        if len(known) == len(prompts)
        else None,
        "images_per_s": sum(reply.images for reply in answered) / seconds,
        "goodput_per_s": good / seconds,
        "good_share": good / len(replies),
        "output_tokens": output,
        "prompt_tokens": sum(known),
        "cached_share": cached_share(answered),
        "tokens_per_delta": output / deltas if deltas else None,
        "tokens_are_deltas": any(reply.counted for reply in answered),
        "ttft_s": quantiles(reply.ttft_s for reply in answered),
        "itl_s": quantiles(gap for reply in answered for gap in itl_s(reply)),
        "tpot_s": quantiles(tpot_s(reply) for reply in answered),
        "duration_s": quantiles(reply.duration_s for reply in answered),
        "late_s": quantiles(reply.late_s for reply in replies),
    }


def cached_share(answered: Iterable[Reply]) -> float | None:
    """The cached share of all prompt tokens; ``None`` if a server does not say."""
    pairs = [(reply.cached_tokens, reply.prompt_tokens) for reply in answered]
    if not pairs or any(cached is None or prompt is None for cached, prompt in pairs):
        return None
    total = sum(prompt or 0 for _, prompt in pairs)
    return sum(cached or 0 for cached, _ in pairs) / total if total else 0.0


def timeline(replies: Sequence[Reply], most: int = 200) -> list[dict[str, Any]]:
    """When each of the first ``most`` requests was sent, got its first text and ended."""
    begun_at = min((reply.sent_at for reply in replies), default=0.0)
    return [
        {
            "sent_s": reply.sent_at - begun_at,
            "first_s": None if reply.ttft_s is None else reply.delta_at[0] - begun_at,
            "end_s": reply.ended_at - begun_at,
            "end": reply.end,
        }
        for reply in sorted(replies, key=lambda reply: reply.sent_at)[:most]
    ]


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians and spread of figures over rounds, however deep they lie; counts are added up.

    A figure that a round lacks is taken of the others.
    """
    names = dict.fromkeys(name for found in rounds for name in found)
    return {name: _over([found.get(name) for found in rounds], name) for name in names}


_ADDED = {"requests", "answered", "refused", "failed", "output_tokens", "prompt_tokens"}


def _over(values: Sequence[Any], name: str) -> Any:
    there = [value for value in values if value is not None]
    if not there:
        return None
    if isinstance(there[0], bool):
        return any(there)
    if isinstance(there[0], dict):
        if name in _ADDED:
            return dict(sum((Counter(value) for value in there), Counter()))
        return summary(there)
    if name in _ADDED:
        return sum(there)
    return spread(there) if isinstance(there[0], int | float) else there[-1]


def ratio(
    ones: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]], name: str
) -> dict[str, float] | None:
    """How many times the others' figure, within a round; by number of the round."""
    found = [
        ones[number][name] / others[number][name]
        for number in ones
        if number in others and ones[number].get(name) and others[number].get(name)
    ]
    return spread(found) if found else None


def median_of(summarised: Mapping[str, Any], *names: str) -> float | None:
    """The median at ``names`` in a summary, if it is there."""
    found: Any = summarised
    for name in names:
        found = (found or {}).get(name)
    return None if found is None else float(found["median"])


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
