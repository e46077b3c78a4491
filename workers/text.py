"""Token ids to text that can be sent: whole characters only, and no stop string ever leaks.

Shared by the kinds that detokenize themselves, so that equal ids give equal text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
Decode = Callable[[Sequence[int]], str]


class IncrementalDecoder:
    """Ids to text, held back while the last character is incomplete.

    Decodes a short window twice a step (with and without the new ids), so that the pieces
    concatenate to the text of all ids whatever the tokenizer does with spaces. The prefix/read
    offsets are the method of vLLM and TGI.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._prefix = 0  # start of the window
        self._read = 0  # up to here the text has been given out

    def push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left, incomplete characters included as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(known) :]


class StopBuffer:
    """Text to text that is safe to send: holds back what may still become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        if self.hit is not None:
            return ""
        self._held += text
        found = min(
            (
                (self._held.find(stop), -len(stop), stop)
                for stop in self._stops
                if stop in self._held
            ),
            default=None,
        )
        if found is not None:
            self.hit = found[2]
            safe, self._held = self._held[: found[0]], ""
            return safe
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        safe, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return safe

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Ids in, sendable text out; ``stopped`` once a stop string has appeared."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(decode)
        self._stops = StopBuffer(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.hit is not None

    def push(self, ids: Sequence[int]) -> str:
        return self._stops.push(self._decoder.push(ids))

    def flush(self) -> str:
        """The rest of the text, when no more ids will come."""
        return self._stops.push(self._decoder.flush()) + self._stops.flush()
