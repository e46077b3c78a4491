"""Chunks of tokens to an answer. The tokenizer here is ASCII: an id is a character, 0 ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import InvalidRequest
from protocol.events import Delta
from protocol.messages import GenerateRequest
from workers.answer import Answer
from workers.sglang.checkpoint import Checkpoint
from workers.sglang.client import Chunk
from workers.sglang.figures import CacheCount
from workers.sglang.stream import push
from workers.text import TextStream

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


def answer(*stop: str) -> Answer:
    return Answer(TextStream(CHECKPOINT.decode, stop), eos_ids=CHECKPOINT.eos_ids, max_tokens=100)


def chunk(text: str, reason: str | None = None) -> Chunk:
    return Chunk(tuple(text.encode()), reason, prompt_tokens=1, cached_tokens=0)


def pushed(got: Answer, new: Chunk) -> Delta:
    return push(got, new, CHECKPOINT.spell)


def test_many_tokens_in_one_chunk() -> None:
    got = answer()
    assert pushed(got, chunk("Hello")) == Delta(text="Hello", token_ids=tuple(b"Hello"))
    assert got.reason is None


def test_the_end_token_counts_and_says_nothing() -> None:
    got = answer()
    assert pushed(got, chunk("a\0", "stop")) == Delta(text="a", token_ids=(97, EOS))
    assert (got.reason, got.tokens) == ("stop", 2)


def test_a_stop_string_ends_the_answer_inside_a_chunk() -> None:
    got = answer("END")
    assert pushed(got, chunk("aENDmore")) == Delta(text="a", token_ids=tuple(b"aEND"))
    assert got.reason == "stop"


def test_logprobs_end_with_the_answer() -> None:
    new = replace(chunk("aENDm"), logprobs=tuple((-1.0, ((98, -0.5),)) for _ in "aENDm"))
    found = pushed(answer("END"), new).logprobs
    assert found is not None
    assert [one.token for one in found] == list("aEND")
    assert {(one.logprob, one.top[0].token, one.top[0].logprob) for one in found} == {
        (-1.0, "b", -0.5)
    }


def test_an_end_that_only_sglang_knows_of() -> None:
    got = answer("END")
    assert pushed(got, chunk("aE", "length")) == Delta(text="aE", token_ids=tuple(b"aE"))
    assert got.reason == "length"


@pytest.mark.parametrize("token_id", [-1, 128, IMAGE])
def test_ids_that_would_end_the_server_are_refused(token_id: int) -> None:
    with pytest.raises(InvalidRequest, match="resume_token_ids"):
        CHECKPOINT.encode(request(resume_token_ids=(token_id,)))


def test_the_resumed_tokens_follow_the_prompt() -> None:
    assert CHECKPOINT.encode(request(prompt="ab", resume_token_ids=(99,))) == [97, 98, 99]


def test_the_cache_holds_what_was_computed_until_it_is_full() -> None:
    cache = CacheCount(100)
    cache.count(60, 0, 10)
    assert cache.status().used_tokens == 70
    cache.count(60, 30, 10)
    assert (cache.status().used_tokens, cache.status().hit_rate) == (100, 0.25)
