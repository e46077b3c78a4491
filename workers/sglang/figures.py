"""What SGLang says of its load, and what its prefix cache holds; plain functions and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protocol.messages import CacheStatus

_FEW_TOKENS = 4  # too few to tell a speed from


@dataclass(frozen=True, slots=True)
class Load:
    """``/v1/loads``: the schedulers of a server about themselves, taken together.

    The last three are sums since the start. SGLang's own ``gen_throughput`` and
    ``cache_hit_rate`` are not here: they stay 0 unless it is started with ``--enable-metrics``.
    """

    steps: tuple[float, ...]  # when each scheduler last said something, by its clock
    requests: tuple[int, ...]  # that each has, running or waiting
    running: int
    waiting: int
    held_tokens: int  # in the cache; of a server without our hooks only what running requests use
    decoded_tokens: float
    busy_s: float  # spent on prompts and on decoding


def load_of(answer: dict[str, Any]) -> Load:
    """Raises AttributeError, LookupError or TypeError: that is not what SGLang answers."""
    ranks = answer["loads"]
    running = [rank["num_running_reqs"] for rank in ranks]
    # A request whose grammar is being compiled is in another queue.
    waiting = [
        rank["num_waiting_reqs"] + rank.get("queues", {}).get("grammar", 0) for rank in ranks
    ]
    # Sums over steps: their number, the batch's size, microseconds, two products, tokens.
    decoding = [rank.get("decode_moments") or [0.0] * 6 for rank in ranks]
    prefill_us = sum(rank["total_prefill_busy_us"] for rank in ranks)
    return Load(
        steps=tuple(rank["timestamp"] for rank in ranks),
        requests=tuple(map(sum, zip(running, waiting, strict=True))),
        running=sum(running),
        waiting=sum(waiting),
        held_tokens=sum(rank["num_used_tokens"] for rank in ranks),
        decoded_tokens=sum(moments[5] for moments in decoding),
        busy_s=(prefill_us + sum(moments[2] for moments in decoding)) / 1e6,
    )


def tokens_per_s(before: Load, after: Load) -> float | None:
    """Of all requests together while the server was busy; ``None`` when it hardly was."""
    tokens = after.decoded_tokens - before.decoded_tokens
    busy_s = after.busy_s - before.busy_s
    return tokens / busy_s if tokens >= _FEW_TOKENS and busy_s > 0 else None


class CacheCount:
    """What the prefix cache holds and how often it is hit, by SGLang's figures of each answer.

    SGLang reports only the part of the cache that running requests hold. What was computed stays
    until the room is needed, so the cache holds all of it, or is full: an estimate, too high
    where requests computed the same at the same time. A server of ours says it itself
    (``held_tokens``).
    """

    def __init__(self, size_tokens: int) -> None:
        self._size_tokens = size_tokens
        self._computed_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    def count(self, prompt_tokens: int, cached_tokens: int, new_tokens: int) -> None:
        """An answer of ``new_tokens`` to a prompt of which ``cached_tokens`` were there."""
        self._prompt_tokens += prompt_tokens
        self._cached_tokens += cached_tokens
        self._computed_tokens += prompt_tokens - cached_tokens + new_tokens

    def flushed(self) -> None:
        """The cache is empty now."""
        self._computed_tokens = 0

    def status(self, held_tokens: int | None = None) -> CacheStatus:
        used_tokens = self._computed_tokens if held_tokens is None else held_tokens
        return CacheStatus(
            used_tokens=min(used_tokens, self._size_tokens),
            size_tokens=self._size_tokens,
            hit_rate=self._cached_tokens / max(1, self._prompt_tokens),
        )
