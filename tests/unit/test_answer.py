"""When an answer is complete, and why."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from workers.answer import Answer
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


def test_a_resumed_answer_knows_its_text() -> None:
    growing = answer(stop=["##"])
    growing.resume(b"abc#")
    assert growing.push(ord("#")) == ""
    assert (growing.reason, growing.tokens) == ("stop", 5)


@pytest.mark.parametrize(
    ("resumed", "reason"), [(b"a\0", "stop"), (b"a##", "stop"), (b"abcde", "length")]
)
def test_an_answer_resumed_after_its_end_is_complete(resumed: bytes, reason: str) -> None:
    growing = answer(stop=["##"], max_tokens=5)
    growing.resume(resumed)
    assert growing.reason == reason


def test_an_end_of_the_engines_own_gives_out_what_was_held_back() -> None:
    growing = answer(stop=["##"])
    assert growing.push(ord("#")) == ""
    assert growing.end("stop") == "#"
