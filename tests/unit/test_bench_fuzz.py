"""bench.fuzz: its cases can be made again, and its verdicts are right."""

from __future__ import annotations

import json
from random import Random

import pytest

from bench.fuzz import pictures
from bench.fuzz.images import request_of
from bench.fuzz.verdict import Fault, outcome
from protocol.errors import BadImage, Overloaded
from protocol.events import (
    NUL_MEDIA_TYPE,
    SSE_MEDIA_TYPE,
    Delta,
    Failed,
    Finished,
    NulEncoder,
    encode_sse,
)

GENERATE, CHAT = "/worker_generate_stream", "/v1/chat/completions"
DELTA = Delta(text="a", token_ids=(1,))
END = Finished(reason="stop", prompt_tokens=1, completion_tokens=1)
REFUSAL = json.dumps(BadImage("no").body()).encode()


@pytest.mark.parametrize("number", range(60))
def test_a_case_is_what_its_seed_says(number: int) -> None:
    one, other = (
        request_of(pictures.images(rng), rng, "m")
        for rng in (Random(f"3-{number}"), Random(f"3-{number}"))
    )
    assert one == other
    assert json.loads(one.body)["model"] == "m"


def test_every_kind_of_file_can_be_made() -> None:
    for make in pictures.FILES:
        for number in range(20):
            what, data = make(Random(number))
            assert what
            assert isinstance(data, bytes)


@pytest.mark.parametrize(
    ("path", "status", "media_type", "body", "code"),
    [
        (GENERATE, 200, SSE_MEDIA_TYPE, encode_sse(DELTA) + encode_sse(END), "ok"),
        (GENERATE, 200, SSE_MEDIA_TYPE, encode_sse(Failed.of(BadImage("no"))), "bad_image"),
        (GENERATE, 422, "application/json", REFUSAL, "bad_image"),
        (CHAT, 200, SSE_MEDIA_TYPE, b'data: {"choices": []}\n\ndata: [DONE]\n\n', "ok"),
        (CHAT, 200, SSE_MEDIA_TYPE, b"data: %b\n\n" % REFUSAL, "bad_image"),
        (CHAT, 200, "application/json", b'{"choices": [{"finish_reason": "stop"}]}', "ok"),
        ("/healthz", 200, "application/json", b"null", "ok"),
    ],
)
def test_answers_as_they_must_be(
    path: str, status: int, media_type: str, body: bytes, code: str
) -> None:
    assert outcome(path, status, media_type, body) == code


def test_llavas_framing_is_judged_too() -> None:
    encoder = NulEncoder("prompt")
    body = encoder.encode(DELTA) + encoder.encode(END)
    assert outcome(GENERATE, 200, NUL_MEDIA_TYPE, body, prompt="prompt") == "ok"


@pytest.mark.parametrize(
    ("path", "status", "media_type", "body"),
    [
        (GENERATE, 500, "text/plain", b"Internal Server Error"),
        (GENERATE, 404, "application/json", b'{"detail": "Not Found"}'),
        (GENERATE, 500, "application/json", REFUSAL),  # not the status of its code
        (GENERATE, 200, SSE_MEDIA_TYPE, encode_sse(DELTA)),
        (GENERATE, 200, SSE_MEDIA_TYPE, encode_sse(END) * 2),
        (GENERATE, 200, SSE_MEDIA_TYPE, encode_sse(END) + encode_sse(DELTA)),
        (GENERATE, 200, SSE_MEDIA_TYPE, encode_sse(END)[:-3]),
        (GENERATE, 200, "text/plain", b"hello"),
        (CHAT, 200, SSE_MEDIA_TYPE, b'data: {"choices": []}\n\n'),
        (CHAT, 200, SSE_MEDIA_TYPE, b"data: [DONE]\n\n" * 2),
        (CHAT, 200, "application/json", b'{"choices": []}'),
    ],
)
def test_answers_as_they_must_not_be(path: str, status: int, media_type: str, body: bytes) -> None:
    with pytest.raises(Fault):
        outcome(path, status, media_type, body)


def test_an_error_with_a_wait_is_typed() -> None:
    body = json.dumps(Overloaded("full", retry_after_s=1).body()).encode()
    assert outcome("/register_worker", 429, "application/json", body) == "overloaded"
