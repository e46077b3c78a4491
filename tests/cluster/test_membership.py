"""Registering, renewing, restarting, draining: who is in the cluster, and since when."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from protocol.messages import PROTOCOL_VERSION
from tests.cluster.conftest import PATH, Cluster, Running, ask, good_stream, text, until


async def refused(cluster: Cluster, controller: Running, **registration: object) -> str:
    client = cluster.client(controller)
    response = await client.post("/register_worker", json=registration)
    assert response.status_code == 422, response.text
    assert (await cluster.state(controller))["workers"] == []
    message: str = response.json()["error"]["message"]
    return message


async def test_an_unreachable_worker_is_refused(cluster: Cluster) -> None:
    controller = await cluster.controller()
    message = await refused(cluster, controller, worker_name="http://127.0.0.1:1")
    assert "No worker can be reached at http://127.0.0.1:1" in message


async def test_a_malformed_address_is_refused(cluster: Cluster) -> None:
    controller = await cluster.controller()
    for address in ("localhost:40000", "http://a:310001", "ftp://a:1", ""):
        assert "is not an address like" in await refused(cluster, controller, worker_name=address)


async def test_what_is_no_worker_is_refused(cluster: Cluster) -> None:
    controller, other = await cluster.controller(), await cluster.controller()
    assert "No worker can be reached" in await refused(
        cluster, controller, worker_name=other.address
    )


async def test_a_worker_that_gives_anothers_address_is_refused(cluster: Cluster) -> None:
    controller, worker = await cluster.controller(), await cluster.worker()
    status = (await cluster.client(worker).post("/worker_get_status")).json()
    claimed = status | {"epoch": 7, "worker_id": "impostor"}
    message = await refused(cluster, controller, worker_name=worker.address, worker_status=claimed)
    assert "not impostor" in message


async def test_a_heartbeat_with_a_status_registers(cluster: Cluster) -> None:
    controller, worker = await cluster.controller(heartbeat_s=7), await cluster.worker()
    status = (await cluster.client(worker).post("/worker_get_status")).json()
    client = cluster.client(controller)
    beat = {"worker_name": worker.address, "queue_length": 0}
    assert (await client.post("/receive_heart_beat", json=beat)).json()["exist"] is False
    answer = await client.post("/receive_heart_beat", json=beat | {"worker_status": status})
    assert answer.json() == {
        "exist": True,
        "ttl_s": 90,
        "heartbeat_s": 7,
        "protocol_version": PROTOCOL_VERSION,
    }
    assert text(await ask(client, prompt="hello")) == "hello"


async def test_a_silent_worker_expires(cluster: Cluster) -> None:
    controller = await cluster.controller(expiry_s=0.3)
    await cluster.faulty(controller, good_stream())

    async def expired() -> bool:
        return not (await cluster.state(controller))["workers"]

    await until(expired)
    assert (await cluster.state(controller))["events"][0]["what"] == "expired"


async def test_heartbeats_keep_a_worker(cluster: Cluster) -> None:
    controller = await cluster.controller(expiry_s=0.5, heartbeat_s=0.1)
    await cluster.worker(controller)
    ages: list[float] = []

    async def renewed() -> bool:
        ages.append((await cluster.state(controller))["workers"][0]["heartbeat_age_s"])
        return sum(later < earlier for earlier, later in pairwise(ages)) >= 8

    await until(renewed)
    assert "expired" not in {e["what"] for e in (await cluster.state(controller))["events"]}


async def test_a_restarted_controller_is_whole_again(cluster: Cluster) -> None:
    """Heartbeats are 30 s apart; the workers notice the lost connection instead."""
    controller = await cluster.controller()
    workers = [await cluster.worker(controller) for _ in range(2)]
    await controller.vanish()
    again = await cluster.controller(port=controller.port)
    async with asyncio.timeout(10):
        for worker in workers:
            await cluster.wait_listed(again, worker.address)
    assert text(await ask(cluster.client(again), prompt="hello")) == "hello"


async def test_a_worker_outlives_its_controller(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    await controller.vanish()
    assert text(await ask(cluster.client(worker), prompt="hello")) == "hello"


async def test_the_environments_proxies_are_not_asked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    controller = await cluster.controller()
    await cluster.worker(controller)
    assert text(await ask(cluster.client(controller), prompt="hello")) == "hello"


async def test_a_worker_at_two_controllers(cluster: Cluster) -> None:
    controllers = [await cluster.controller(), await cluster.controller()]
    await cluster.worker(*controllers)
    for controller in controllers:
        assert text(await ask(cluster.client(controller), prompt="hello")) == "hello"


async def test_a_restarted_worker_takes_its_place(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    await worker.vanish()
    await cluster.worker(controller, port=worker.port)
    assert text(await ask(cluster.client(controller), prompt="hello")) == "hello"
    assert len((await cluster.state(controller))["workers"]) == 1


async def test_a_controller_below_a_controller(cluster: Cluster) -> None:
    top = await cluster.controller()
    bottom = await cluster.controller(register_at=(top.address,))
    await cluster.worker(bottom)
    await cluster.wait_listed(top, bottom.address)
    client = cluster.client(top)
    assert text(await ask(client, prompt="hello")) == "hello"
    asked = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}
    answer = (await client.post("/v1/chat/completions", json=asked)).json()
    assert answer["choices"][0]["message"]["content"] == "Hi"


async def test_drain_and_resume(cluster: Cluster) -> None:
    controller = await cluster.controller(dispatch_method="shortest_queue")
    await cluster.worker(controller, worker_id="one", delay_s=0.01)
    await cluster.worker(controller, worker_id="two", delay_s=0.01)
    client = cluster.client(controller)
    running = [asyncio.create_task(ask(client, prompt="x" * 50)) for _ in range(4)]

    async def spread() -> bool:
        workers = (await cluster.state(controller))["workers"]
        return all(worker["inflight"] for worker in workers)

    await until(spread)
    drained = (await client.post("/workers/one/drain")).json()
    assert drained["state"] == "draining"
    for _ in range(4):
        assert text(await ask(client, prompt="a")) == "a"
    for task in running:
        assert text(await task) == "x" * 50
    workers = {w["worker_id"]: w for w in (await cluster.state(controller))["workers"]}
    assert workers["one"]["state"] == "draining"
    assert (await client.post("/workers/two/drain")).status_code == 200
    response = await client.post(PATH, json={"model": "echo", "prompt": "a"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_replica"
    assert int(response.headers["retry-after"]) >= 1
    assert (await client.post("/workers/one/resume")).json()["state"] == "ready"
    assert text(await ask(client, prompt="a")) == "a"
    assert (await client.post("/workers/three/drain")).status_code == 422


async def test_a_worker_that_stops_leaves_without_losing_a_stream(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller, delay_s=0.01)
    client = cluster.client(controller)
    running = asyncio.create_task(ask(client, prompt="x" * 50))

    async def busy() -> bool:
        return bool((await cluster.state(controller))["load"]["inflight"])

    await until(busy)
    assert await worker.stop() == 0
    assert text(await running) == "x" * 50

    async def left() -> bool:
        return bool((await cluster.state(controller))["events"][0]["what"] == "left")

    await until(left)


async def test_a_controller_that_stops_finishes_what_runs(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, delay_s=0.01)
    client = cluster.client(controller)
    running = asyncio.create_task(ask(client, prompt="x" * 50))

    async def busy() -> bool:
        return bool((await cluster.state(controller))["load"]["inflight"])

    await until(busy)
    assert await controller.stop() == 0
    assert text(await running) == "x" * 50


async def test_refresh_forgets_those_that_do_not_answer(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    client = cluster.client(controller)
    await client.post("/refresh_all_workers")
    assert len((await cluster.state(controller))["workers"]) == 1
    await worker.vanish()
    await client.post("/refresh_all_workers")
    assert (await cluster.state(controller))["workers"] == []
