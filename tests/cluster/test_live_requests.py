"""Where a request stands, told while it waits and runs."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.cluster.conftest import PATH, SSE, Cluster, until


async def test_a_request_waits_runs_and_is_gone(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(
        controller, worker_id="one", limit_model_concurrency=1, first_delay_s=0.3, delay_s=0.02
    )
    client = cluster.client(controller)

    def post(name: str) -> asyncio.Task[Any]:
        asked = {"model": "echo", "prompt": "hello there", "request_id": name}
        return asyncio.create_task(client.post(PATH, json=asked, headers=SSE))

    async def stands(name: str, **fields: object) -> bool:
        found = (await client.get(f"/requests/{name}")).json()
        return all(found.get(key) == value for key, value in fields.items())

    first = post("first")
    await until(lambda: stands("first", state="running", worker_id="one", kind="echo", place=None))
    second = post("second")
    await until(lambda: stands("second", state="waiting", place=1, waiting=1, worker_id=None))
    third = post("third")
    await until(lambda: stands("third", state="waiting", place=2, waiting=2))
    await first
    await until(lambda: stands("third", state="waiting", place=1, waiting=1))
    third.cancel()
    await second
    gone = await client.get("/requests/first")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "not_found"
    await cluster.wait_quiet(controller)
    assert (await client.get("/requests/third")).status_code == 404


async def test_the_time_to_first_token_is_told_while_it_streams(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, delay_s=0.05)
    client = cluster.client(controller)
    asked = {"model": "echo", "prompt": "a long answer " * 40, "request_id": "it"}
    async with client.stream("POST", PATH, json=asked, headers=SSE) as response:
        pieces = response.aiter_raw()  # held: its end would be the client's
        await anext(pieces)
        found = (await client.get("/requests/it")).json()
    assert found["state"] == "running"
    assert 0 < found["ttft_s"] < 20


async def test_an_answer_names_its_worker(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, worker_id="one\r\nX-Evil: é")
    client = cluster.client(controller)
    asked = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    for path, more in (
        (PATH, {}),
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"n": 2}),
    ):
        for accept in (SSE, {}):
            response = await client.post(path, json=asked | more, headers=accept)
            assert response.status_code == 200
            named = response.headers.get_list("x-tandem-worker")
            assert set(named) == {"one??X-Evil: ?"}
            assert set(response.headers.get_list("x-tandem-kind")) == {"echo"}
            assert "x-evil" not in response.headers
    refused = await client.post(PATH, json=asked | {"model": "x"})
    assert "x-tandem-worker" not in refused.headers
