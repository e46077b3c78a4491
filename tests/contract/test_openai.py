"""What OpenAI's official client asks of each real kind through a controller."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict

from tests.contract.conftest import REAL_KINDS, START_TIMEOUT_S
from tests.pictures import encoded, picture
from tests.streams import ask, user

pytestmark = pytest.mark.timeout(2 * START_TIMEOUT_S + 60)

COUNT: Any = [{"role": "user", "content": "Count from 1 to 20."}]
GREEDY: dict[str, Any] = {"model": "pocket-llava", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(controller: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{controller}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(params=REAL_KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The extra that asks for one kind of worker."""
    return {"kind": request.param}


def test_the_answer_is_that_of_our_own_route(
    client: OpenAI, controller: str, kind: dict[str, Any]
) -> None:
    whole = client.chat.completions.create(messages=COUNT, **GREEDY, extra_body=kind)
    ours = ask(
        controller,
        model="pocket-llava",
        messages=user("Count from 1 to 20."),
        temperature=0,
        max_new_tokens=24,
        **kind,
    )
    assert whole.choices[0].message.content == ours.text
    assert whole.choices[0].finish_reason == ours.finished.reason
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(ours.token_ids)


def test_a_picture(client: OpenAI, kind: dict[str, Any]) -> None:
    url = f"data:image/png;base64,{encoded(picture())}"
    parts: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    messages: Any = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(messages=messages, **GREEDY, extra_body=kind)
    assert "red circle" in (answer.choices[0].message.content or "")


def test_logprobs(client: OpenAI, kind: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"messages": COUNT, "logprobs": True, "top_logprobs": 2, **GREEDY}
    whole: ChatCompletion = client.chat.completions.create(**asked, extra_body=kind)
    assert whole.choices[0].logprobs is not None
    tokens = whole.choices[0].logprobs.content or []
    assert whole.usage is not None
    assert len(tokens) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.top_logprobs[0].token == token.token for token in tokens), "it was greedy"
    assert all(bytes(token.bytes or ()).decode() == token.token for token in tokens)
    assert tokens[0].logprob == pytest.approx(tokens[0].top_logprobs[0].logprob)
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**asked, stream=True, extra_body=kind):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                streamed += choice.logprobs.content or []
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_logprobs_of_a_completion(client: OpenAI, kind: dict[str, Any]) -> None:
    answer = client.completions.create(
        prompt="Count from 1 to 20.", logprobs=3, **GREEDY, extra_body=kind
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert answer.usage is not None
    tokens, offsets = logprobs.tokens or [], logprobs.text_offset or []
    assert len(tokens) == answer.usage.completion_tokens
    assert offsets[0] == 0
    assert [b - a for a, b in pairwise(offsets)] == [len(token) for token in tokens[:-1]]
    assert all(len(top) == 3 for top in logprobs.top_logprobs or [])
    assert all(math.isfinite(value or 0) for value in logprobs.token_logprobs or [])


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green", "blue"]
    round: bool


def test_a_schema_is_parsed(client: OpenAI, kind: dict[str, Any]) -> None:
    fields = GREEDY | {"max_tokens": 60}
    parsed = client.chat.completions.parse(
        messages=COUNT, response_format=Shape, **fields, extra_body=kind
    )
    assert isinstance(parsed.choices[0].message.parsed, Shape)
    with client.chat.completions.stream(
        messages=COUNT, response_format=Shape, **fields, extra_body=kind
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_a_regex_and_an_object(client: OpenAI, kind: dict[str, Any]) -> None:
    answer = client.chat.completions.create(
        messages=COUNT, **GREEDY, extra_body=kind | {"regex": "(red|blue) [0-9]{2}"}
    )
    assert answer.choices[0].message.content in {
        f"{colour} {n:02}" for colour in ("red", "blue") for n in range(100)
    }
    whole = client.chat.completions.create(
        messages=COUNT,
        response_format={"type": "json_object"},
        **(GREEDY | {"max_tokens": 400}),
        extra_body=kind,
    )
    if whole.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(whole.choices[0].message.content or ""), dict)
    else:
        assert (whole.choices[0].message.content or "").lstrip().startswith("{")


def test_an_adapter_by_the_models_name(client: OpenAI, kind: dict[str, Any]) -> None:
    names = {model.id for model in client.models.list()}
    assert {"pocket-llava", "pocket-llava:formal", "pocket-llava:terse"} <= names
    asked = GREEDY | {"model": "pocket-llava:formal"}
    named = client.chat.completions.create(messages=COUNT, **asked, extra_body=kind)
    field = client.chat.completions.create(
        messages=COUNT, **GREEDY, extra_body=kind | {"adapter": "formal"}
    )
    assert named.choices[0].message.content == field.choices[0].message.content


def test_cached_tokens_are_told(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "What is a lease? " * 40}]
    for _ in range(2):
        answer = client.chat.completions.create(
            messages=long, **GREEDY, extra_body={"kind": "sglang"}
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 100
