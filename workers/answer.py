"""An answer that grows token by token, and the decision that it is complete; for every kind."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal

from workers.text import TextStream

Reason = Literal["stop", "length"]


class Answer:
    """Ids in, text out; ``reason`` once the answer is complete.

    Text is a function of the ids alone: the push of the last id also returns what was held back.
    """

    def __init__(self, text: TextStream, *, eos_ids: Set[int], max_tokens: int) -> None:
        self._text = text
        self._eos_ids = eos_ids
        self.max_tokens = max_tokens
        self.tokens = 0
        self.reason: Reason | None = None

    @property
    def tokens_left(self) -> int:
        return self.max_tokens - self.tokens

    def resume(self, token_ids: Sequence[int]) -> None:
        """Take over what was generated elsewhere, in silence; it may already be complete."""
        for token_id in token_ids:
            self.push(token_id)
            if self.reason is not None:
                return

    def push(self, token_id: int) -> str:
        """The text that may be sent after ``token_id``."""
        self.tokens += 1
        ended = token_id in self._eos_ids
        text = "" if ended else self._text.push([token_id])
        if ended or self._text.stopped or self.tokens >= self.max_tokens:
            text += self.end("stop" if ended or self._text.stopped else "length")
        return text

    def end(self, reason: Reason) -> str:
        """Complete it; returns the text that was held back."""
        rest = self._text.flush()
        self.reason = reason
        return rest


def eos_ids(*sources: object) -> frozenset[int]:
    """The tokens that end an answer: all that the configurations and the tokenizer name."""
    ids: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or ())
    return frozenset(ids)
