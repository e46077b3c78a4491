"""OpenAI's official client, sync and async, at one controller with echo workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.cluster.conftest import Cluster, Running, good_stream
from tests.pictures import encoded, picture

CHAT = "/v1/chat/completions"
USER: Any = [{"role": "user", "content": "naïve ☃"}]
ASKED = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}


@pytest.fixture
async def controller(cluster: Cluster) -> Running:
    controller = await cluster.controller(alias=("gpt-4o=echo",))
    await cluster.worker(controller)
    return controller


@pytest.fixture
async def client(controller: Running) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{controller.address}/v1", api_key="unused", max_retries=0
    ) as client:
        yield client


# ---------------------------------------------------------------- answers


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["echo", "gpt-4o"]
    assert (await client.models.retrieve("echo")).owned_by == "tandem"
    with pytest.raises(openai.NotFoundError, match="Unknown model 'x'"):
        await client.models.retrieve("x")


async def test_a_whole_answer(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="echo", messages=USER)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "naïve ☃"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_a_streamed_answer(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="echo",
        messages=USER,
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=4,
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "naï"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_the_typed_streaming_helper(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="echo", messages=USER) as stream:
        texts = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(texts) == "naïve ☃" == final.choices[0].message.content
    assert len(texts) > 3, "it comes in pieces"


async def test_the_sync_client(controller: Running) -> None:
    def talk() -> tuple[str | None, str, str | None]:
        with OpenAI(base_url=f"{controller.address}/v1", api_key="unused") as client:
            whole = client.chat.completions.create(model="echo", messages=USER)
            parts = client.chat.completions.create(model="echo", messages=USER, stream=True)
            text = "".join(part.choices[0].delta.content or "" for part in parts)
            with client.chat.completions.stream(model="echo", messages=USER) as stream:
                final = stream.get_final_completion()
        return whole.choices[0].message.content, text, final.choices[0].message.content

    assert await asyncio.to_thread(talk) == ("naïve ☃",) * 3


async def test_completions(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model="echo", prompt="abc", max_tokens=2)
    assert whole.object == "text_completion"
    assert whole.choices[0].text == "ab"
    assert whole.choices[0].finish_reason == "length"
    stream = await client.completions.create(
        model="echo",
        prompt="abc",
        stream=True,
        echo=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "abcabc"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_several_prompts_of_several_answers_each(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "echo", "prompt": ["ab", "cde"], "n": 2, "seed": 1}
    whole = await client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in whole.choices] == ["ab", "ab", "cde", "cde"]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 2 + 3, "a prompt is counted once"
    assert whole.usage.completion_tokens == 2 * 3 + 2 * 4
    texts = [""] * 4
    stream = await client.completions.create(**asked, stream=True)
    async for part in stream:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == ["ab", "ab", "cde", "cde"]


async def test_several_choices_of_a_chat(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="echo", messages=USER, n=3)
    assert [choice.message.content for choice in whole.choices] == ["naïve ☃"] * 3
    stream = await client.chat.completions.create(model="echo", messages=USER, n=3, stream=True)
    texts, ends = [""] * 3, []
    async for part in stream:
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends.append(choice.index)
    assert texts == ["naïve ☃"] * 3
    assert sorted(ends) == [0, 1, 2]


async def test_a_picture(client: AsyncOpenAI) -> None:
    url = f"data:image/png;base64,{encoded(picture())}"
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                {"type": "text", "text": "What is it?"},
            ],
        },
    ]
    answer = await client.chat.completions.create(model="echo", messages=messages, n=2)
    assert [choice.message.content for choice in answer.choices] == ["What is it?"] * 2
    text = await client.completions.create(
        model="echo", prompt="<image> What?", extra_body={"images": [url]}
    )
    assert text.choices[0].text == "<image> What?"


async def test_extras_and_what_means_nothing(client: AsyncOpenAI, controller: Running) -> None:
    answer = await client.chat.completions.create(
        model="echo",
        messages=USER,
        user="ada",
        seed=7,
        stop=["☃"],
        presence_penalty=0.0,
        response_format={"type": "text"},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "kind": "echo"},
    )
    assert answer.choices[0].message.content == "naïve "


async def test_null_means_not_given(cluster: Cluster, controller: Running) -> None:
    names = (
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "max_tokens",
        "stream",
        "user",
        "logprobs",
    )
    asked = ASKED | dict.fromkeys(names)
    response = await cluster.client(controller).post(CHAT, json=asked)
    assert response.json()["choices"][0]["message"]["content"] == "a"


async def test_without_a_limit_an_answer_is_as_long_as_it_gets(client: AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": "x" * 1000}]
    answer = await client.chat.completions.create(model="echo", messages=long)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == "x" * 1000


async def test_an_alias(client: AsyncOpenAI, cluster: Cluster, controller: Running) -> None:
    answer = await client.chat.completions.create(model="gpt-4o", messages=USER)
    assert answer.model == "gpt-4o"
    assert answer.choices[0].message.content == "naïve ☃"
    with pytest.raises(openai.NotFoundError, match="adapter 'formal'"):
        await client.chat.completions.create(model="gpt-4o:formal", messages=USER)
    http = cluster.client(controller)
    asked = {"model": "gpt-4o", "prompt": "hi"}
    assert b"hihi" in (await http.post("/worker_generate_stream", json=asked)).content
    assert (await http.post("/get_worker_address", json={"model": "gpt-4o"})).json()["address"]


# ---------------------------------------------------------------- refusals


def content(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"max_token": 5}, 422, "max_token", "no such field here; is max_tokens meant?"),
        ({"tools": []}, 422, "tools", "tools: there is no such field here"),
        ({"model": "gpt-5"}, 404, "model", "Unknown model 'gpt-5'"),
        ({"n": 0}, 422, "n", "n: Input should be greater"),
        ({"n": 33}, 422, "n", "n: Input should be less"),
        ({"messages": []}, 422, "messages", "messages"),
        ({"temperature": -1}, 422, "temperature", "temperature"),
        ({"max_tokens": 0}, 422, "max_tokens", "max_tokens"),
        ({"max_tokens": 10**6}, 422, "max_tokens", "one answer may have 131072"),
        ({"top_logprobs": 3}, 422, "top_logprobs", "it needs logprobs"),
        ({"logprobs": True}, 422, None, "supports logprobs"),
        ({"response_format": {"type": "json_schema"}}, 422, None, "json_schema format needs it"),
        ({"response_format": {"type": "json_object"}}, 422, None, "supports grammar"),
        ({"kind": "sglang"}, 503, None, "No sglang worker serves this model; there is only echo"),
        ({"adapter": "formal"}, 404, "adapter", "No worker has the adapter 'formal' loaded"),
        (content("http://127.0.0.1/a.png"), 422, None, "data URIs only"),
        (content("file:///etc/passwd"), 422, None, "data URIs only"),
        (content("data:image/png;base64,AAAA"), 422, None, "cannot be decoded"),
    ],
    ids=str,
)
async def test_refusals(
    cluster: Cluster,
    controller: Running,
    change: dict[str, object],
    status: int,
    param: str | None,
    words: str,
) -> None:
    response = await cluster.client(controller).post(CHAT, json=ASKED | change)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["code"]
    assert error["remedy"]
    if param is not None:
        assert error["param"] == param


async def test_a_refusal_is_a_typed_exception(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.chat.completions.create(
            model="echo", messages=USER, extra_body={"max_token": 3}
        )
    assert caught.value.code == "invalid_request"
    assert caught.value.param == "max_token"
    assert caught.value.type == "request_error"


async def test_too_many_images(cluster: Cluster) -> None:
    controller = await cluster.controller(max_images=1)
    await cluster.worker(controller)
    url = f"data:image/png;base64,{encoded(picture())}"
    part = {"type": "image_url", "image_url": {"url": url}}
    asked = ASKED | {"messages": [{"role": "user", "content": [part, part]}]}
    response = await cluster.client(controller).post(CHAT, json=asked)
    assert response.status_code == 413
    assert "2 images in one request; 1 are the most" in response.json()["error"]["message"]


async def test_many_answers_to_a_large_body(cluster: Cluster) -> None:
    controller = await cluster.controller(max_body_bytes=2000)
    await cluster.worker(controller)
    asked = ASKED | {"messages": [{"role": "user", "content": "x" * 1500}], "n": 8}
    response = await cluster.client(controller).post(CHAT, json=asked)
    assert response.status_code == 413
    assert response.json()["error"]["param"] == "n"


# ---------------------------------------------------------------- failures and leaving


@pytest.mark.parametrize("n", [1, 3])
async def test_a_failure_in_the_middle_is_the_last_word(cluster: Cluster, n: int) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, fail_after=30, fail_with="out_of_memory")
    long: Any = [{"role": "user", "content": "x" * 50}]  # the worker warms up with less
    asked = ASKED | {"messages": long, "stream": True, "n": n}
    response = await cluster.client(controller).post(CHAT, json=asked)
    frames = response.text.strip().split("\n\n")
    last = orjson.loads(frames[-1].removeprefix("data: "))
    assert last["error"]["code"] == "out_of_memory"
    assert all("error" not in orjson.loads(f.removeprefix("data: ")) for f in frames[:-1])
    async with AsyncOpenAI(base_url=f"{controller.address}/v1", api_key="x") as client:
        stream = await client.chat.completions.create(model="echo", messages=long, stream=True, n=n)
        with pytest.raises(openai.APIError, match="The echo engine fails"):
            async for _ in stream:
                pass
    await cluster.wait_quiet(controller)


async def test_one_of_several_answers_refused_refuses_them_all(cluster: Cluster) -> None:
    controller = await cluster.controller(max_waiting=1)
    await cluster.worker(controller, limit_model_concurrency=1, first_delay_s=0.2)
    response = await cluster.client(controller).post(CHAT, json=ASKED | {"n": 5})
    assert response.status_code == 429
    assert response.headers["retry-after"]
    await cluster.wait_quiet(controller)


async def test_a_worker_that_dies_under_several_answers(cluster: Cluster) -> None:
    controller = await cluster.controller()
    whole = good_stream("fine")
    await cluster.faulty(controller, whole[: whole.index(b"event: finished")])
    response = await cluster.client(controller).post(CHAT, json=ASKED | {"n": 2, "stream": True})
    last = orjson.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "upstream_lost"
    await cluster.wait_quiet(controller)


async def test_leaving_frees_every_answers_slot(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, delay_s=0.05)
    async with AsyncOpenAI(base_url=f"{controller.address}/v1", api_key="x") as client:
        long: Any = [{"role": "user", "content": "x" * 400}]
        stream = await client.chat.completions.create(model="echo", messages=long, stream=True, n=4)
        async for _ in stream:
            break
        assert (await cluster.state(controller))["load"]["inflight"] == 4
        await stream.close()
    await cluster.wait_quiet(controller)


# ---------------------------------------------------------------- the description


async def test_the_description_has_the_streaming_routes(
    cluster: Cluster, controller: Running
) -> None:
    found = (await cluster.client(controller).get("/openapi.json")).json()
    for path in (CHAT, "/v1/completions", "/worker_generate_stream"):
        post = found["paths"][path]["post"]
        assert "requestBody" in post
        assert {"200", "404", "422", "429", "503"} <= post["responses"].keys()
    chat = found["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["additionalProperties"] is False
    assert "top_k" in chat["properties"]
