"""What SGLang's prefix cache holds, counted from its answers."""

from __future__ import annotations

from protocol.messages import CacheStatus
from workers.sglang.client import Chunk


class CacheCount:
    """What the prefix cache holds.

    Counted here: SGLang reports only the part that running requests hold. What was computed stays
    until the room is needed, so the cache holds all of it, or is full.
    """

    def __init__(self, size_tokens: int) -> None:
        self._size_tokens = size_tokens
        self._computed_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    def count(self, chunk: Chunk, new_tokens: int) -> None:
        self._prompt_tokens += chunk.prompt_tokens
        self._cached_tokens += chunk.cached_tokens
        self._computed_tokens += chunk.prompt_tokens - chunk.cached_tokens + new_tokens

    def status(self) -> CacheStatus:
        return CacheStatus(
            used_tokens=min(self._computed_tokens, self._size_tokens),
            size_tokens=self._size_tokens,
            hit_rate=self._cached_tokens / max(1, self._prompt_tokens),
        )
