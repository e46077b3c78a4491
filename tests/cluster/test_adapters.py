"""Adapters by name: chosen in either spelling, loaded and unloaded while the cluster runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import AdapterNotFound, EngineFailed, InvalidRequest
from protocol.events import Delta, Finished
from protocol.messages import GenerateRequest
from tests.cluster.conftest import PATH, Cluster, Running, ask, text, until
from workers.echo.engine import EchoEngine
from workers.engine import EngineInfo, Progress
from workers.images import Picture


class AdaptedEcho(EchoEngine):
    """An echo whose adapters put their names before the answer."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._adapters: dict[str, str] = {}

    async def start(self, progress: Progress) -> EngineInfo:
        info = await super().start(progress)
        return replace(info, capabilities=info.capabilities.model_copy(update={"adapters": True}))

    async def generate(
        self, request: GenerateRequest, images: Sequence[Picture]
    ) -> AsyncGenerator[Delta | Finished]:
        if request.adapter is not None:
            yield Delta(text=f"[{request.model}, {request.adapter}] ", token_ids=(1,))
        async with aclosing(super().generate(request, images)) as events:
            async for event in events:
                yield event

    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    async def load_adapter(self, name: str, path: str) -> None:
        if path == "nowhere":
            raise EngineFailed("The adapter nowhere is not there.", remedy="Give a directory.")
        if path == "broken":
            raise KeyError(path)
        if name in self._adapters:
            raise InvalidRequest(f"An adapter {name!r} is loaded already.")
        self._adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        if name not in self._adapters:
            raise AdapterNotFound(f"No adapter {name!r} is loaded.")
        del self._adapters[name]


async def load(cluster: Cluster, worker: Running, name: str) -> dict[str, Any]:
    response = await cluster.client(worker).post("/adapters", json={"name": name, "path": "p"})
    assert response.status_code == 200, response.text
    status: dict[str, Any] = response.json()
    return status


async def wait_models(cluster: Cluster, controller: Running, *names: str) -> None:
    """Heartbeats are 30 s apart, so a change in time was told by itself."""

    async def listed() -> bool:
        found = (await cluster.client(controller).get("/v1/models")).json()["data"]
        return [model["id"] for model in found] == list(names)

    await until(listed, timeout_s=5)


async def refusal(cluster: Cluster, at: Running, **fields: Any) -> tuple[int, str]:
    asked = {"model": "echo", "prompt": "hi"} | fields
    response = await cluster.client(at).post(PATH, json=asked)
    return response.status_code, response.json()["error"]["code"]


async def test_an_adapter_comes_and_goes(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller, engine=AdaptedEcho)
    await cluster.worker(controller, delay_s=0)  # of the same model, without adapters
    for at in (controller, worker):
        assert await refusal(cluster, at, model="echo:formal") == (404, "adapter_not_found")
    status = await load(cluster, worker, "formal")
    assert status["model_names"] == ["echo", "echo:formal"]
    assert status["adapters"] == ["formal"]
    assert status["capabilities"]["adapters"]
    await wait_models(cluster, controller, "echo", "echo:formal")
    for at in (controller, worker):
        for spelling in ({"model": "echo:formal"}, {"adapter": "formal"}):
            for _ in range(4):
                events = await ask(cluster.client(at), prompt="hi", **spelling)
                assert text(events) == "[echo, formal] hi"
        assert text(await ask(cluster.client(at), prompt="hi")) == "hi"
    chat = {"model": "echo:formal", "messages": [{"role": "user", "content": "hi"}]}
    answer = (await cluster.client(controller).post("/v1/chat/completions", json=chat)).json()
    assert answer["choices"][0]["message"]["content"] == "[echo, formal] hi"
    assert answer["model"] == "echo:formal"
    where = await cluster.client(controller).post(
        "/get_worker_address", json={"model": "echo:formal"}
    )
    assert where.json() == {"address": controller.address}

    response = await cluster.client(worker).delete("/adapters/formal")
    assert response.json()["model_names"] == ["echo"]
    await wait_models(cluster, controller, "echo")
    for at in (controller, worker):
        for spelling in ({"model": "echo:formal"}, {"adapter": "formal"}):
            assert await refusal(cluster, at, **spelling) == (404, "adapter_not_found")
    where = await cluster.client(controller).post(
        "/get_worker_address", json={"model": "echo:formal"}
    )
    assert where.json() == {"address": ""}


async def test_two_spellings_that_disagree(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller, engine=AdaptedEcho)
    await load(cluster, worker, "formal")
    await load(cluster, worker, "terse")
    await wait_models(cluster, controller, "echo", "echo:formal", "echo:terse")
    for at in (controller, worker):
        found = await refusal(cluster, at, model="echo:formal", adapter="terse")
        assert found == (422, "invalid_request")
        events = await ask(cluster.client(at), prompt="hi", model="echo:terse", adapter="terse")
        assert text(events) == "[echo, terse] hi"


async def test_a_model_whose_name_contains_a_colon(cluster: Cluster) -> None:
    worker = await cluster.worker(engine=AdaptedEcho, model_name="echo:7b")
    await load(cluster, worker, "formal")
    client = cluster.client(worker)
    assert text(await ask(client, prompt="hi", model="echo:7b")) == "hi"
    events = await ask(client, prompt="hi", model="echo:7b:formal")
    assert text(events) == "[echo:7b, formal] hi"
    assert await refusal(cluster, worker, model="echo:formal") == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "formal", "path": "p"}, 422, "'formal' is loaded already"),
        ({"name": "base", "path": "p"}, 422, "base is the model without an adapter"),
        ({"name": "a:b", "path": "p"}, 422, "name: "),
        ({"name": "a"}, 422, "path: "),
        ({"name": "a", "path": "nowhere"}, 500, "is not there"),
        ({"name": "a", "path": "broken"}, 500, "The engine failed: KeyError"),
    ],
)
async def test_what_cannot_be_loaded(
    cluster: Cluster, body: dict[str, str], status: int, words: str
) -> None:
    worker = await cluster.worker(engine=AdaptedEcho)
    await load(cluster, worker, "formal")
    client = cluster.client(worker)
    response = await client.post("/adapters", json=body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert (await client.get("/adapters")).json() == {"adapters": ["formal"]}


async def test_what_cannot_be_unloaded(cluster: Cluster) -> None:
    worker = await cluster.worker(engine=AdaptedEcho)
    response = await cluster.client(worker).delete("/adapters/nobody")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "adapter_not_found"


async def test_a_worker_that_takes_no_adapters(cluster: Cluster) -> None:
    worker = await cluster.worker()
    client = cluster.client(worker)
    assert (await client.get("/adapters")).json() == {"adapters": []}
    for response in (
        await client.post("/adapters", json={"name": "a", "path": "p"}),
        await client.delete("/adapters/a"),
    ):
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "unsupported"
    assert await refusal(cluster, worker, adapter="a") == (404, "adapter_not_found")


async def test_through_two_controllers(cluster: Cluster) -> None:
    top = await cluster.controller()
    bottom = await cluster.controller(register_at=(top.address,), heartbeat_s=0.2)
    worker = await cluster.worker(bottom, engine=AdaptedEcho)
    await load(cluster, worker, "formal")
    await wait_models(cluster, bottom, "echo", "echo:formal")
    await cluster.wait_listed(top, bottom.address)
    await cluster.client(top).post("/refresh_all_workers")
    await wait_models(cluster, top, "echo", "echo:formal")
    events = await ask(cluster.client(top), prompt="hi", model="echo:formal")
    assert text(events) == "[echo, formal] hi"
    assert await refusal(cluster, top, model="echo:nobody") == (404, "adapter_not_found")
