"""LLaVA's clients and workers, many clients at once, and what is told of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import orjson

from protocol.events import Delta, Failed, Finished
from tests.cluster.conftest import PATH, Cluster, ask, chunk, text
from tests.pictures import encoded, picture

LLAVA = {"speed": 1, "queue_length": 0, "worker_id": "", "epoch": 0, "kind": "llava"}
LLAVA_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def llava_frames(prompt: str, words: list[str]) -> bytes:
    """What LLaVA's model worker sends."""
    out = LLAVA_HEAD
    for count in range(1, len(words) + 1):
        frame = {"text": prompt + "".join(words[:count]), "error_code": 0}
        out += chunk(orjson.dumps(frame) + b"\0")
    return out + b"0\r\n\r\n"


async def test_llavas_client(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    client = cluster.client(controller)
    assert (await client.post("/refresh_all_workers")).status_code == 200
    models = (await client.post("/list_models")).json()["models"]
    assert models == ["echo"]
    address = (await client.post("/get_worker_address", json={"model": models[0]})).json()
    assert address == {"address": controller.address}, "the dispatcher's"
    assert (await client.post("/get_worker_address", json={"model": "x"})).json() == {"address": ""}
    asked: dict[str, Any] = {
        "model": "echo",
        "prompt": "USER: <image>\nWhat? ASSISTANT:",
        "temperature": 0.2,
        "top_p": 0.7,
        "max_new_tokens": 200,
        "stop": "</s>",
        "images": [encoded(picture())],
    }
    for address_ in (controller, worker):
        response = await cluster.client(address_).post(PATH, json=asked)
        frames = [orjson.loads(frame) for frame in response.content.split(b"\0") if frame]
        assert all(frame["text"].startswith(asked["prompt"]) for frame in frames)
        assert all(frame["error_code"] == 0 for frame in frames)
        assert frames[-1]["text"] == asked["prompt"] * 2
        assert frames[-1]["finish_reason"] == "stop"


async def test_a_refusal_is_readable_for_llavas_client(cluster: Cluster) -> None:
    controller = await cluster.controller()
    response = await cluster.client(controller).post(PATH, json={"model": "x", "prompt": "a"})
    frame = orjson.loads(response.content)
    assert frame["error_code"] == 404
    assert frame["text"].startswith("Unknown model 'x'")


async def test_llavas_worker_joins_and_is_dispatched_to(cluster: Cluster) -> None:
    controller = await cluster.controller()
    frames = llava_frames("Hi ", ["one ", "two ", "three"])
    await cluster.faulty(controller, frames, capabilities={"images": True}, **LLAVA)
    client = cluster.client(controller)
    events = await ask(client, prompt="Hi ")
    assert [e.text for e in events if isinstance(e, Delta)] == ["one ", "two ", "three"]
    assert events[-1] == Finished(reason="stop")
    asked = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}
    response = await client.post("/v1/chat/completions", json=asked)
    assert response.json()["error"]["code"] == "unsupported", "it has no chat template of its own"


async def test_a_llava_worker_that_dies_inside_a_frame(cluster: Cluster) -> None:
    controller = await cluster.controller()
    frames = llava_frames("Hi ", ["one "])[: -len(b"0\r\n\r\n")] + chunk(b'{"text": "Hi one t')
    await cluster.faulty(controller, frames, **LLAVA)
    events = await ask(cluster.client(controller), prompt="Hi ")
    assert [type(event) for event in events] == [Delta, Failed]


async def test_request_ids_are_adopted_or_minted(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller)
    client = cluster.client(controller)
    asked = {"model": "echo", "prompt": "a"}
    given = await client.post(PATH, json=asked, headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    in_body = await client.post(PATH, json=asked | {"request_id": "mine-2"})
    assert in_body.headers["x-request-id"] == "mine-2"
    assert len((await client.post(PATH, json=asked)).headers["x-request-id"]) == 32


async def test_the_waiting_room_refuses_with_retry_after(cluster: Cluster) -> None:
    controller = await cluster.controller(max_waiting=1)
    await cluster.worker(controller, limit_model_concurrency=1, delay_s=0.02)
    client = cluster.client(controller)
    posts = [client.post(PATH, json={"model": "echo", "prompt": "x" * 30}) for _ in range(6)]
    responses = await asyncio.gather(*posts)
    statuses = Counter(response.status_code for response in responses)
    assert statuses == {200: 2, 429: 4}
    for response in responses:
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
    await cluster.wait_quiet(controller)


async def test_a_body_too_large(cluster: Cluster) -> None:
    controller = await cluster.controller(max_body_bytes=2000)
    response = await cluster.client(controller).post(
        PATH, content=b'{"model": "echo", "prompt": "%b"}' % (b"a" * 3000)
    )
    assert response.status_code == 413
    assert "the limit is 2000" in response.json()["error"]["message"]


async def test_faster_workers_get_more(cluster: Cluster) -> None:
    controller = await cluster.controller(dispatch_method="lottery")
    for worker_id, delay_s in (("fast", 0.001), ("slow", 0.02)):
        await cluster.worker(controller, worker_id=worker_id, delay_s=delay_s)
    client = cluster.client(controller)
    await asyncio.gather(*(ask(client, prompt="hello there") for _ in range(60)))
    metrics = {}
    for worker in (await cluster.state(controller))["workers"]:
        async with httpx.AsyncClient() as direct:
            found = (await direct.get(f"{worker['address']}/metrics")).text
        name = "tandem_worker_generation_tokens_total"
        line = next(line for line in found.splitlines() if line.startswith(name))
        metrics[worker["worker_id"]] = float(line.split()[-1])
    assert metrics["fast"] > 2 * metrics["slow"]


async def test_two_hundred_streams_at_once(cluster: Cluster) -> None:
    controller = await cluster.controller()
    for _ in range(2):
        await cluster.worker(controller, delay_s=0.001)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=controller.address, limits=limits, timeout=60) as client:
        answers = await asyncio.gather(*(ask(client, prompt=f"request {n}") for n in range(200)))
    assert [text(events) for events in answers] == [f"request {n}" for n in range(200)]
    await cluster.wait_quiet(controller)


async def test_metrics_and_cluster_tell_the_same(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, worker_id="one")
    client = cluster.client(controller)
    for _ in range(3):
        await ask(client, prompt="abc")
    found = (await client.get("/metrics")).text
    assert 'tandem_requests_total{model="echo",outcome="stop"} 3.0' in found
    assert 'tandem_generation_tokens_total{model="echo"} 12.0' in found
    assert 'tandem_time_to_first_token_seconds_count{model="echo"} 3.0' in found
    assert "tandem_ready_replicas 1.0" in found
    assert "tandem_num_requests_running 0.0" in found
    state = await cluster.state(controller)
    assert state["models"] == ["echo"]
    assert state["workers"][0]["worker_id"] == "one"
    assert state["workers"][0]["capacity"] == 64
    assert state["events"][-1]["what"] == "registered"
