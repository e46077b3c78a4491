"""An answer as it grows, and what the prefix cache holds after it."""

from __future__ import annotations

from typing import Literal

from protocol.events import Finished
from protocol.messages import CacheStatus, GenerateRequest
from workers.sglang.checkpoint import Checkpoint
from workers.sglang.client import Chunk
from workers.text import TextStream


class Answer:
    """An answer that grows by chunks; ``reason`` once it is complete."""

    def __init__(self, checkpoint: Checkpoint, request: GenerateRequest, *, room: int) -> None:
        self._eos_ids = checkpoint.eos_ids
        self._text = TextStream(checkpoint.decode, request.stop)
        self.max_tokens = min(request.max_new_tokens, room)
        self.tokens = 0
        self.reason: Literal["stop", "length"] | None = None
        for token_id in request.resume_token_ids:
            self._push(token_id)
            if self.reason is not None:
                break

    def push(self, chunk: Chunk) -> tuple[tuple[int, ...], str]:
        """The tokens of ``chunk`` that belong to the answer, and the text that may be sent."""
        text = ""
        taken = 0
        for token_id in chunk.token_ids:
            if self.reason is not None:
                break
            text += self._push(token_id)
            taken += 1
        if self.reason is None and chunk.reason is not None:
            text += self._text.flush()
            self.reason = "length" if chunk.reason == "length" else "stop"
        return chunk.token_ids[:taken], text

    def _push(self, token_id: int) -> str:
        self.tokens += 1
        ended = token_id in self._eos_ids
        text = "" if ended else self._text.push([token_id])
        if ended or self._text.stopped or self.tokens >= self.max_tokens:
            text += self._text.flush()
            self.reason = "stop" if ended or self._text.stopped else "length"
        return text

    def finished(self, prompt_tokens: int, cached_tokens: int) -> Finished:
        assert self.reason is not None
        return Finished(
            reason=self.reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=self.tokens,
            cached_tokens=cached_tokens,
        )


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
