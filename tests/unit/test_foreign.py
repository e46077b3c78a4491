"""What LLaVA's and FastChat's workers can do, and the requests they understand."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from controller import foreign
from protocol.messages import GenerateRequest, Registration, WorkerState, WorkerStatus
from tests.unit.fakes import status

THREE = WorkerStatus(model_names=("m",), speed=1, queue_length=0)


def registration(**fields: Any) -> Registration:
    return Registration.model_validate({"worker_name": "http://a:1"} | fields)


@pytest.mark.parametrize(
    ("multimodal", "kind", "sees"),
    [(None, "llava", True), (True, "fastchat", True), (False, "fastchat", False)],
)
def test_who_registers(multimodal: bool | None, kind: str, sees: bool) -> None:
    described = foreign.described(THREE, registration(multimodal=multimodal))
    assert described.kind == kind
    assert described.capabilities.images == sees
    assert not described.capabilities.chat
    later = foreign.as_known(THREE, described)
    assert (later.kind, later.capabilities) == (kind, described.capabilities)


def test_a_worker_of_ours_speaks_for_itself() -> None:
    ours = status()
    assert foreign.described(ours, registration(multimodal=False)) is ours
    assert foreign.as_known(ours, THREE) is ours


def test_one_that_does_not_listen_yet_gets_nothing() -> None:
    assert foreign.not_yet_listening(THREE).state is WorkerState.STARTING


def test_a_request_in_their_words() -> None:
    body = orjson.dumps({"stop": ["a", "b"], "stop_token_ids": [7], "temperature": None})
    request = GenerateRequest(
        model="m", prompt="<image>", images=("data:image/png;base64,aGk=",), stop=("a", "b")
    )
    assert orjson.loads(foreign.body_of(request, body)) == {
        "model": "m",
        "prompt": "<image>",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 256,
        "stop": "a",
        "stop_token_ids": [7],
        "echo": False,
        "images": ["aGk="],
    }


def test_llavas_worker_cannot_do_without_a_stop_string() -> None:
    request = GenerateRequest(model="m", prompt="Hi")
    assert orjson.loads(foreign.body_of(request, b"{}"))["stop"] == "</s>"
