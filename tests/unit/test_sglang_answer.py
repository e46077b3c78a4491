"""Chunks of tokens to an answer. The tokenizer here is ASCII: an id is a character, 0 ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from protocol.errors import InvalidRequest
from protocol.messages import GenerateRequest
from workers.sglang.answer import Answer, CacheCount
from workers.sglang.checkpoint import Checkpoint
from workers.sglang.client import Chunk

EOS = 0
IMAGE = 127


class Ascii:
    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode()


CHECKPOINT = Checkpoint(
    tokenizer=Ascii(),
    apply_template=None,
    image_token=None,
    image_token_id=IMAGE,
    image_tokens=0,
    eos_ids=frozenset({EOS}),
    vocab_size=128,
    precision="float32",
)


def request(**given: Any) -> GenerateRequest:
    return GenerateRequest(**{"model": "m", "prompt": "p", **given})


def answer(room: int = 100, **given: Any) -> Answer:
    return Answer(CHECKPOINT, request(**given), room=room)


def chunk(text: str, reason: str | None = None) -> Chunk:
    return Chunk(tuple(text.encode()), reason, prompt_tokens=1, cached_tokens=0)


def test_many_tokens_in_one_chunk() -> None:
    got = answer()
    assert got.push(chunk("Hello")) == (tuple(b"Hello"), "Hello")
    assert got.reason is None


def test_the_end_token_counts_and_says_nothing() -> None:
    got = answer()
    assert got.push(chunk("a\0", "stop")) == ((97, EOS), "a")
    assert (got.reason, got.tokens) == ("stop", 2)


def test_what_a_stop_string_might_have_been_is_given_out_at_the_end() -> None:
    got = answer(stop="END")
    assert got.push(chunk("aEN"))[1] == "a"
    assert got.push(chunk("\0", "stop"))[1] == "EN"


def test_a_stop_string_ends_the_answer_inside_a_chunk() -> None:
    got = answer(stop="END")
    assert got.push(chunk("aENDmore")) == (tuple(b"aEND"), "a")
    assert got.reason == "stop"


def test_a_stop_string_at_the_limit_is_a_stop() -> None:
    got = answer(stop="b", max_new_tokens=2)
    got.push(chunk("ab", "length"))
    assert got.reason == "stop"


def test_the_limit_is_the_smaller_of_the_wish_and_the_room() -> None:
    assert answer(room=5, max_new_tokens=9).max_tokens == 5
    assert answer(room=9, max_new_tokens=5).max_tokens == 5


def test_a_resumed_answer_knows_its_text() -> None:
    got = answer(stop="END", resume_token_ids=tuple(b"aEN"))
    assert got.push(chunk("D")) == ((68,), "")
    assert (got.reason, got.tokens) == ("stop", 4)


@pytest.mark.parametrize(
    ("resumed", "reason"), [(b"a\0", "stop"), (b"aEND", "stop"), (b"abcde", "length")]
)
def test_an_answer_resumed_after_its_end_is_complete(resumed: bytes, reason: str) -> None:
    got = answer(stop="END", max_new_tokens=5, resume_token_ids=tuple(resumed))
    assert got.reason == reason


@pytest.mark.parametrize("token_id", [-1, 128, IMAGE])
def test_ids_that_would_end_the_server_are_refused(token_id: int) -> None:
    with pytest.raises(InvalidRequest, match="resume_token_ids"):
        CHECKPOINT.encode(request(resume_token_ids=(token_id,)))


def test_the_resumed_tokens_follow_the_prompt() -> None:
    assert CHECKPOINT.encode(request(prompt="ab", resume_token_ids=(99,))) == [97, 98, 99]


def test_the_cache_holds_what_was_computed_until_it_is_full() -> None:
    cache = CacheCount(100)
    cache.count(Chunk((), None, prompt_tokens=60, cached_tokens=0), 10)
    assert cache.status().used_tokens == 70
    cache.count(Chunk((), None, prompt_tokens=60, cached_tokens=30), 10)
    assert (cache.status().used_tokens, cache.status().hit_rate) == (100, 0.25)
