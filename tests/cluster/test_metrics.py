"""What /metrics tells after a success, a failure, a refusal and a client that left."""

from __future__ import annotations

import asyncio
import logging
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protocol.logs import JsonFormatter, TextFormatter
from protocol.version import VERSION
from tests.cluster.conftest import PATH, SSE, Cluster, ask, until
from transport.process import free_port


async def figures(client: httpx.AsyncClient) -> dict[str, float]:
    """Each series by its name and labels, as Prometheus reads them."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found, f"{key} twice: Prometheus would drop the scrape"
            found[key] = sample.value
    return found


def requests(found: dict[str, float], name: str = "tandem_requests_total") -> dict[str, float]:
    return {k.removeprefix(name): v for k, v in found.items() if k.startswith(name)}


async def test_every_end_of_a_request_is_counted(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(
        controller, worker_id="one", delay_s=0.01, fail_after=30, context_length=400
    )
    client = cluster.client(controller)
    await ask(client, prompt="abc")
    await ask(client, prompt="x" * 50)  # fails after thirty tokens
    assert (await client.post(PATH, json={"model": "echo", "prompt": "x" * 500})).is_error
    async with client.stream("POST", PATH, json={"model": "echo", "prompt": "y" * 20}) as response:
        async for _ in response.aiter_bytes():
            break
    await cluster.wait_quiet(controller)
    found = await figures(client)
    assert requests(found) == {
        "{model=echo,outcome=stop}": 1,
        "{model=echo,outcome=engine_failed}": 1,
        "{model=echo,outcome=context_overflow}": 1,
        "{model=echo,outcome=cancelled}": 1,
    }
    assert found["tandem_prompt_tokens_total{model=echo}"] == 3
    assert found["tandem_generation_tokens_total{model=echo}"] == 4
    assert found["tandem_cached_prompt_tokens_total{model=echo}"] == 0
    assert found["tandem_time_to_first_token_seconds_count{model=echo}"] == 3
    assert found["tandem_e2e_request_latency_seconds_count{model=echo}"] == 4
    assert found["tandem_request_queue_time_seconds_count{model=echo}"] == 4
    assert found["tandem_inter_token_latency_seconds_count{model=echo}"] > 10  # gaps of chunks
    assert found["tandem_num_requests_waiting"] == found["tandem_num_requests_running"] == 0
    assert found["tandem_waiting_bytes"] == 0
    assert found[f"tandem_build_info{{version={VERSION}}}"] == 1
    assert found["process_resident_memory_bytes"] > 1e6
    assert not [name for name in found if "_created" in name]

    replica = "{kind=echo,model=echo,worker_id=one}"
    assert found[f"tandem_replica_capacity{replica}"] == 64
    assert found[f"tandem_replica_num_requests_running{replica}"] == 0
    assert found[f"tandem_replica_speed_tokens_per_second{replica}"] > 1
    assert 0 <= found[f"tandem_replica_heartbeat_age_seconds{replica}"] < 60
    state = "tandem_replica_state{kind=echo,model=echo,state=%s,worker_id=one}"
    assert found[state % "ready"] == 1
    assert found[state % "draining"] == 0

    own = await figures(cluster.client(worker))
    assert requests(own, "tandem_worker_requests_total") == {
        "{outcome=stop}": 1,
        "{outcome=engine_failed}": 1,
        "{outcome=context_overflow}": 1,
        "{outcome=cancelled}": 1,
    }
    assert own["tandem_worker_prompt_tokens_total"] == 3
    assert own["tandem_worker_generation_tokens_total"] >= 4 + 30
    assert own["tandem_worker_time_to_first_token_seconds_count"] == 3
    assert own["tandem_worker_request_queue_time_seconds_count"] == 4
    assert own["tandem_worker_num_requests_running"] == 0
    assert own["tandem_worker_capacity"] == 64
    assert own[f"tandem_build_info{{version={VERSION}}}"] == 1
    assert own["process_resident_memory_bytes"] > 1e6


async def test_what_is_refused_at_the_door_is_counted_and_logged_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    controller = await cluster.controller(max_body_bytes=2000)
    worker = await cluster.worker(controller)
    client = cluster.client(controller)
    await client.post(PATH, content=b"{nonsense", headers={"x-request-id": "bad-1"})
    await client.post("/v1/chat/completions", json={"model": "echo"})
    too_large = await client.post(PATH, content=b"x" * 3000)
    code = too_large.json()["error"]["code"]
    found = requests(await figures(client))
    assert sum(found.values()) == 3
    assert found[f"{{model=unknown,outcome={code}}}"] >= 1
    lines = [r for r in caplog.records if r.getMessage() == "refused"]
    assert len(lines) == 3
    assert (
        TextFormatter()
        .format(lines[0])
        .endswith(f"refused request_id=bad-1 outcome=invalid_request status=422 path={PATH}")
    )
    await cluster.client(worker).post(PATH, content=b"{nonsense")
    own = await figures(cluster.client(worker))
    assert own["tandem_worker_requests_total{outcome=invalid_request}"] == 1


async def test_an_image_that_cannot_be_fetched_is_a_refusal(cluster: Cluster) -> None:
    controller = await cluster.controller(image_url_host=("127.0.0.1",))
    await cluster.worker(controller)
    client = cluster.client(controller)
    url = f"http://127.0.0.1:{free_port()}/a.png"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    asked = {"model": "echo", "messages": [{"role": "user", "content": content}]}
    code = (await client.post("/v1/chat/completions", json=asked)).json()["error"]["code"]
    assert requests(await figures(client)) == {f"{{model=unknown,outcome={code}}}": 1}


async def test_names_that_clients_invent_are_no_labels(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller)
    client = cluster.client(controller)
    for number in range(20):
        for model in (f"made-up-{number}", f"echo:made-up-{number}"):
            assert (await client.post(PATH, json={"model": model, "prompt": "x"})).is_error
    found = await figures(client)
    assert not [name for name in found if "made-up" in name]
    assert requests(found) == {
        "{model=unknown,outcome=model_not_found}": 20,
        "{model=echo,outcome=adapter_not_found}": 20,
    }


async def test_two_workers_of_one_name_do_not_break_the_scrape(cluster: Cluster) -> None:
    controller = await cluster.controller()
    for _ in range(2):
        await cluster.worker(controller, worker_id="twin")
    found = await figures(cluster.client(controller))
    assert found["tandem_ready_replicas"] == 2
    assert len([n for n in found if n.startswith("tandem_replica_inflight{")]) == 2


async def test_what_waits_is_seen_while_it_waits(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, worker_id="one", limit_model_concurrency=1, delay_s=0.02)
    client = cluster.client(controller)
    both = [asyncio.create_task(ask(client, prompt="x" * 100)) for _ in range(2)]

    async def waits() -> dict[str, float] | None:
        found = await figures(client)
        return found if found["tandem_num_requests_waiting"] else None

    found = await until(waits)
    assert found["tandem_num_requests_running"] == 1
    assert found["tandem_waiting_bytes"] > 100
    assert found["tandem_replica_inflight{kind=echo,model=echo,worker_id=one}"] == 1
    await asyncio.gather(*both)
    found = await figures(client)
    assert found["tandem_num_requests_waiting"] == found["tandem_waiting_bytes"] == 0
    assert found["tandem_request_queue_time_seconds_sum{model=echo}"] > 0.5


FORGED = "m\n2026-01-01 00:00:00 INFO    controller  finished outcome=stop\x1b[2J\u2028\x9b1m"


async def test_a_client_cannot_forge_a_line_of_the_log(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    controller = await cluster.controller()
    client = cluster.client(controller)
    for fields in (
        {"model": FORGED, "prompt": "x"},
        {"model": "echo outcome=stop", "prompt": "x"},
        {"model": "echo", "prompt": "x", "adapter": FORGED},
        {"model": "echo", "prompt": "x", "kind": FORGED},
        {"model": "echo", "prompt": "x", "request_id": FORGED},
    ):
        await client.post(PATH, json=fields, headers={"x-request-id": "a outcome=stop"})
    lines = [r for r in caplog.records if r.getMessage() in ("finished", "refused")]
    assert len(lines) == 5
    for record in lines:
        line = TextFormatter().format(record)
        assert line.isprintable()
        assert len(re.findall(r"(?:^| )outcome=", re.sub(r"'[^']*'", "''", line))) == 1
        assert "request_id='a outcome=stop'" in line
        assert JsonFormatter().format(record).isprintable()


async def test_the_line_of_a_request_says_it_all(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    controller = await cluster.controller()
    await cluster.faulty(controller, b"")
    await cluster.worker(controller, worker_id="one")
    client = cluster.client(controller)
    body = {"model": "echo", "prompt": "the secret", "request_id": "line-1"}
    await client.post(PATH, json=body, headers=SSE)
    [record] = [
        r
        for r in caplog.records
        if r.name.startswith("controller") and r.getMessage() == "finished"
    ]
    line = TextFormatter().format(record)
    assert re.search(
        r"finished request_id=line-1 worker_id=one model=echo kind=echo outcome=stop "
        r"waited_s=[\d.]+ ttft_s=[\d.]+ duration_s=[\d.]+ prompt_tokens=10 cached_tokens=0 "
        r"tokens=11 tries=2$",
        line,
    ), line
    assert not any("secret" in str(vars(r)) for r in caplog.records)
