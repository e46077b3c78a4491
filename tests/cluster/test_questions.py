"""FastChat's questions about a model, at the controller."""

from __future__ import annotations

from typing import Any

import orjson

from tests.cluster.conftest import PATH, Cluster, until

HI: dict[str, Any] = {"model": "echo", "prompt": "Hi"}


async def test_a_worker_is_asked(cluster: Cluster) -> None:
    controller = await cluster.controller(alias=("other=echo",))
    worker = await cluster.worker(controller)
    for address in (controller, worker):
        client = cluster.client(address)
        counted = await client.post("/count_token", json=HI)
        assert counted.json() == {"count": 2, "error_code": 0}
        details = await client.post("/model_details", json=HI)
        assert details.json() == {"context_length": 8192}
        conv = (await client.post("/worker_get_conv_template", json=HI)).json()["conv"]
        assert (conv["roles"], conv["sep"], conv["sep2"]) == (["USER", " ASSISTANT"], "", "</s>")
    client = cluster.client(controller)
    assert (await client.post("/model_details", json={"model": "other"})).status_code == 200
    unknown = await client.post("/model_details", json={"model": "x"})
    assert unknown.json()["error"]["code"] == "model_not_found"
    for path in ("/list_language_models", "/list_multimodal_models"):
        assert (await client.post(path)).json() == {"models": ["echo", "other"]}


async def test_the_address_of_a_model_is_the_controllers_with_the_key(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller)
    client = cluster.client(controller)
    asked = await client.post("/get_worker_address", json=HI, auth=("any", "k/1:2"))
    host = controller.address.removeprefix("http://")
    assert asked.json() == {"address": f"http://any:k%2F1%3A2@{host}"}
    plain = await client.post("/get_worker_address", json=HI)
    assert plain.json() == {"address": controller.address}
    assert (await client.get("/test_connection")).json() == "success"


async def test_another_one_is_asked_when_the_first_is_lost(cluster: Cluster) -> None:
    controller = await cluster.controller()
    faulty = await cluster.faulty(controller, b"")
    worker = await cluster.worker(controller)
    client = cluster.client(controller)
    faulty._status = []  # type: ignore[assignment]  # what it answers, to whatever question
    counted = await client.post("/count_token", json=HI)
    assert counted.json() == {"count": 2, "error_code": 0}

    async def forgotten() -> bool:
        workers = (await cluster.state(controller))["workers"]
        return [found["address"] for found in workers] == [worker.address]

    await until(forgotten)


async def test_a_whole_answer(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    for address in (controller, worker):
        client = cluster.client(address)
        answer = (await client.post("/worker_generate", json=HI | {"echo": False})).json()
        assert (answer["text"], answer["error_code"]) == ("Hi", 0)
        assert (answer["finish_reason"], answer["usage"]["prompt_tokens"]) == ("stop", 2)
        assert (await client.post("/worker_generate", json=HI)).json()["text"] == "HiHi"


async def test_fastchat_is_told_what_is_wrong(cluster: Cluster) -> None:
    """It reads no status, and no body that is not a frame."""
    controller = await cluster.controller()
    worker = await cluster.worker(controller, context_length=64)
    asked = HI | {"prompt": "too long" * 9, "echo": False}
    for address in (controller, worker):
        client = cluster.client(address)
        for fields, code in ((asked, 413), (asked | {"top_p": 7}, 422)):
            whole = await client.post("/worker_generate", json=fields)
            stream = await client.post(PATH, json=fields)
            assert stream.content.endswith(b"\0")
            for answer in (whole.json(), orjson.loads(stream.content[:-1])):
                assert answer["error_code"] == code
                assert answer["text"]


async def test_a_worker_that_registers_before_it_listens(cluster: Cluster) -> None:
    """As LLaVA's and FastChat's do: it gets requests when it answers."""
    controller = await cluster.controller()
    client = cluster.client(controller)
    worker = await cluster.worker()
    port = worker.port
    await worker.vanish()
    claimed = {"model_names": ["echo"], "speed": 1, "queue_length": 0}
    registered = await client.post(
        "/register_worker",
        json={"worker_name": worker.address, "check_heart_beat": True, "worker_status": claimed},
    )
    assert registered.status_code == 200
    assert (await client.post("/list_models")).json() == {"models": []}
    await cluster.worker(port=port)

    async def served() -> bool:
        return bool((await client.post("/list_models")).json()["models"])

    await until(served)
