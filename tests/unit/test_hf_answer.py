"""workers.hf.answer: when an answer is complete, and why.

pytest tests/unit/test_hf_answer.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from workers.hf.answer import Answer
from workers.text import TextStream

EOS = 0


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def answer(*, stop: Sequence[str] = (), max_tokens: int = 100) -> Answer:
    return Answer(TextStream(decode, stop), eos_ids={EOS}, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("ids", "stop", "max_tokens", "text", "reason"),
    [
        (b"abc", (), 100, "abc", None),
        (b"abc\0", (), 100, "abc", "stop"),
        (b"abc", (), 3, "abc", "length"),
        (b"ab\0", (), 3, "ab", "stop"),
        (b"abc##", ("##",), 100, "abc", "stop"),
        (b"abc##", ("##",), 5, "abc", "stop"),
        (b"abc#", ("##",), 4, "abc#", "length"),
        (b"abc#\0", ("##",), 100, "abc#", "stop"),
        (b"ab\xc3", (), 3, "ab\ufffd", "length"),
    ],
)
def test_the_end(
    ids: bytes, stop: Sequence[str], max_tokens: int, text: str, reason: str | None
) -> None:
    growing = answer(stop=stop, max_tokens=max_tokens)
    reasons = []
    sent = ""
    for token_id in ids:
        sent += growing.push(token_id)
        reasons.append(growing.reason)
    assert sent == text
    assert reasons == [None] * (len(ids) - 1) + [reason]
    assert growing.tokens == len(ids)
