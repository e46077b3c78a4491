"""An answer that grows token by token, and the decision that it is complete."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

from workers.text import TextStream


class Answer:
    """Ids in, text out; ``reason`` once the answer is complete.

    Text is a function of the ids alone: the push of the last id also returns what was held back.
    A resumed answer is therefore primed by pushing its ids and ignoring the text.
    """

    def __init__(self, text: TextStream, *, eos_ids: Set[int], max_tokens: int) -> None:
        self._text = text
        self._eos_ids = eos_ids
        self.max_tokens = max_tokens
        self.tokens = 0
        self.reason: Literal["stop", "length"] | None = None

    def push(self, token_id: int) -> str:
        """The text that may be sent after ``token_id``."""
        self.tokens += 1
        ended = token_id in self._eos_ids
        text = "" if ended else self._text.push([token_id])
        if ended or self._text.stopped or self.tokens >= self.max_tokens:
            text += self._text.flush()
            self.reason = "stop" if ended or self._text.stopped else "length"
        return text
