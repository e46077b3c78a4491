"""Requests: what is taken, what is refused, and what LLaVA sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from protocol.messages import (
    FASTCHAT,
    LLAVA,
    AdapterSource,
    Capabilities,
    GenerateRequest,
    Heartbeat,
    ImagePart,
    Lease,
    Registration,
    TextPart,
    WorkerStatus,
)
from transport import asgi


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"model": "m"} | fields)


def test_llavas_request_is_valid() -> None:
    llava = request(
        prompt="A chat. USER: <image>\nWhat is it? ASSISTANT:",
        temperature=0.2,
        top_p=0.7,
        max_new_tokens=512,
        stop="</s>",
        images=["aGk="],
        conv_mode="vicuna_v1",
    )
    assert llava.stop == ("</s>",)
    assert llava.needs == {"images"}


def test_llavas_status_and_registration_are_valid() -> None:
    three = {"model_names": ["llava"], "speed": 1, "queue_length": 0}
    registration = Registration.model_validate(
        {"worker_name": "http://a:1", "check_heart_beat": True, "worker_status": three}
    )
    assert registration.worker_status is not None
    assert registration.worker_status.kind == "llava"
    assert registration.worker_status.capacity is None
    beat = Heartbeat.model_validate({"worker_name": "http://a:1", "queue_length": 3})
    assert beat.worker_status is None
    assert Lease.model_validate({"exist": True}).heartbeat_s == 15


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a", "images": ["x"]},
        {"prompt": "<image><image>", "images": ["x"]},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "temperature": float("nan")},
        {"prompt": "a", "top_p": 1.5},
        {"prompt": "a", "top_k": 2**30},
        {"prompt": "a", "repetition_penalty": 5e-324},
        {"prompt": "a", "presence_penalty": 2.1},
        {"prompt": "a", "frequency_penalty": -2.1},
        {"prompt": "a", "max_new_tokens": 0},
        {"prompt": "a", "stop": ["a", ""]},
        {"prompt": "a", "stop": ["a"] * 17},
        {"prompt": "a", "json_schema": "{}", "regex": "a"},
        {"prompt": "a", "request_id": "two words"},
        {"prompt": "a", "model": ""},
    ],
    ids=str,
)
def test_nonsense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(**fields)


def test_null_is_nothing() -> None:
    assert request(prompt="a", images=None, stop=None).stop == ()
    assert request(prompt="a", stop="").stop == ()


def test_null_is_the_default_in_every_field_that_has_one() -> None:
    fields = GenerateRequest.model_fields
    nulls = {name: None for name, field in fields.items() if not field.is_required()}
    assert request(**nulls | {"prompt": "a"}) == request(prompt="a")
    wire = json.dumps(nulls | {"model": "m", "prompt": "a"}).encode()
    assert asgi.parse(GenerateRequest, wire) == request(prompt="a")
    with pytest.raises(ValidationError, match="model"):
        request(model=None, prompt="a")


def test_placeholders_in_messages() -> None:
    asked = request(
        messages=[
            {"role": "user", "content": "<image>\nWhat is it?"},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And it?"}]},
        ],
        images=["a", "b"],
    )
    assert asked.placeholders == 2
    assert asked.needs == {"chat", "images"}
    assert asked.messages is not None
    assert asked.messages[0].parts == (ImagePart(), TextPart(text="\nWhat is it?"))


def test_a_refusal_names_the_field_and_not_the_value() -> None:
    with pytest.raises(Exception, match=r"^top_p: Input should be less than or equal to 1\.$") as e:
        asgi.parse(GenerateRequest, b'{"model": "m", "prompt": "secret", "top_p": 7}')
    assert "secret" not in str(e.value)


def test_missing_capabilities_by_name() -> None:
    asked = request(prompt="a", seed=1, logprobs=2)
    assert Capabilities(seed=True).missing(asked.needs) == ["logprobs"]


@pytest.mark.parametrize(
    ("asked", "lacking"),
    [
        ({"top_k": 5}, {"llava": ["sampling"], "fastchat": []}),
        ({"repetition_penalty": 1.1}, {"llava": ["sampling"], "fastchat": []}),
        ({"min_p": 0.1}, {"llava": ["min_p"], "fastchat": ["min_p"]}),
        ({"presence_penalty": 0.5}, {"llava": ["penalties"], "fastchat": ["penalties"]}),
        ({"frequency_penalty": -1}, {"llava": ["penalties"], "fastchat": ["penalties"]}),
        ({"temperature": 0.3, "top_p": 0.9}, {"llava": [], "fastchat": []}),
    ],
    ids=str,
)
def test_what_the_workers_of_others_would_ignore(
    asked: dict[str, float], lacking: dict[str, list[str]]
) -> None:
    needs = request(prompt="a", **asked).needs
    assert {"llava": LLAVA.missing(needs), "fastchat": FASTCHAT.missing(needs)} == lacking
    assert not Capabilities().missing(needs), "ours know them all"


@pytest.mark.parametrize("name", ["a", "Formal-1.5_x", "x" * 64])
def test_names_of_adapters(name: str) -> None:
    assert AdapterSource(name=name, path="p").name == name


@pytest.mark.parametrize("name", ["", "base", "a:b", "a/b", "a b", "é", "a\n", "x" * 65])
def test_what_no_adapter_may_be_called(name: str) -> None:
    with pytest.raises(ValidationError):
        AdapterSource(name=name, path="p")


@pytest.mark.parametrize(
    ("names", "adapters", "bases"),
    [
        (("m",), (), ("m",)),
        (("m", "m:a", "m:b"), ("a", "b"), ("m",)),
        (("m:a",), ("a",), ("m:a",)),  # no m is served, so it is a name with a colon
        (("m:7b", "m:7b:a"), ("a",), ("m:7b",)),
        (("m", "m:7b"), (), ("m", "m:7b")),
    ],
)
def test_the_bases_of_a_worker(
    names: tuple[str, ...], adapters: tuple[str, ...], bases: tuple[str, ...]
) -> None:
    assert WorkerStatus(model_names=names, adapters=adapters).bases == bases


def test_a_status_survives_the_wire() -> None:
    status = WorkerStatus(model_names=("m",), worker_id="w", versions={"torch": "2"}, capacity=3)
    assert WorkerStatus.model_validate_json(status.model_dump_json()) == status


def test_fastchats_request_is_valid() -> None:
    fastchat = request(
        prompt="USER: Hi ASSISTANT:",
        temperature=0.7,
        top_p=None,
        top_k=-1,
        logprobs=None,
        presence_penalty=0.0,
        max_new_tokens=64,
        echo=False,
        stop=[],
        stop_token_ids=None,
        images=None,
        best_of=None,
    )
    assert fastchat.top_k == 0
    assert fastchat.top_p == 1.0
    assert not fastchat.echo
    assert fastchat.needs == frozenset()
    assert request(prompt="Hi").echo, "LLaVA has no such field, and echoes"
