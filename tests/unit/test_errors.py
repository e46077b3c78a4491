"""Each row of the error tree: its code, its status, its JSON, and back."""

from __future__ import annotations

import pytest

from protocol.errors import ERRORS, EngineFailed, Overloaded, TandemError, from_wire
from transport.asgi import retry_after

TABLE = {
    "invalid_request": (422, False),
    "too_large": (413, False),
    "context_overflow": (413, False),
    "bad_image": (422, False),
    "model_not_found": (404, False),
    "adapter_not_found": (404, False),
    "unsupported": (422, False),
    "unauthenticated": (401, False),
    "forbidden": (403, False),
    "not_found": (404, False),
    "method_not_allowed": (405, False),
    "overloaded": (429, False),
    "rate_limited": (429, False),
    "no_replica": (503, False),
    "draining": (503, True),
    "upstream_lost": (502, True),
    "engine_failed": (500, False),
    "out_of_memory": (503, True),
    "deadline_exceeded": (504, False),
}


def test_the_table() -> None:
    assert {c: (e.status, e.retry_elsewhere) for c, e in ERRORS.items()} == TABLE


@pytest.mark.parametrize("code", TABLE)
def test_each_survives_the_wire(code: str) -> None:
    error = ERRORS[code]("What happened.", retry_after_s=2.5)
    body = error.body()
    wire = body["error"]
    again = from_wire(wire["code"], wire["message"], wire["remedy"], wire["retry_after_s"])
    assert type(again) is type(error)
    assert again.body() == body


@pytest.mark.parametrize("code", TABLE)
def test_each_has_a_remedy_and_llavas_error_code(code: str) -> None:
    error = ERRORS[code]("What happened.")
    assert error.remedy != TandemError.default_remedy
    assert error.body()["error_code"] == error.llava_error_code != 0
    assert error.body()["text"] == f"What happened. {error.remedy}"


def test_an_unknown_code_is_an_engine_failure() -> None:
    assert type(from_wire("new_in_2031", "a")) is EngineFailed


def test_retry_after_is_whole_seconds_and_never_zero() -> None:
    assert retry_after(Overloaded("a", retry_after_s=0.01)) == [(b"retry-after", b"1")]
    assert retry_after(Overloaded("a", retry_after_s=2.2)) == [(b"retry-after", b"3")]
    assert retry_after(Overloaded("a")) == []
