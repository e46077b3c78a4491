"""Traces across controller and workers, seen by a real collector."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.cluster.conftest import (
    PATH,
    SSE,
    Cluster,
    Running,
    ask,
    text,
    until,
)
from tests.cluster.traces import Collector, Span
from tests.pictures import encoded, picture
from transport.process import free_port

SECRET = "the-kings-new-password"
CONTROLLER, WORKER = "tandem-controller", "tandem-worker"


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    collector = Collector()
    await collector.start()
    try:
        yield collector
    finally:
        await collector.stop()


async def traced(cluster: Cluster, collector: Collector, **worker: Any) -> Running:
    """A controller and a worker that send their traces to ``collector``."""
    controller = await cluster.controller(otlp_endpoint=collector.address)
    await cluster.worker(controller, otlp_endpoint=collector.address, worker_id="one", **worker)
    return controller


async def arrived(collector: Collector, service: str, request_id: str) -> Span:
    async def found() -> Span | None:
        return collector.request(service, request_id)

    span = await until(found)
    assert isinstance(span, Span)
    return span


def below(collector: Collector, parent: Span) -> list[Span]:
    spans = collector.of(parent.service, parent.trace_id)
    return [span for span in spans if span.parent_id == parent.span_id]


def in_a_row(parent: Span, phases: list[Span]) -> None:
    """Each phase begins where the one before it ended, all within their parent."""
    times = [parent.begun_ns, *(t for p in phases for t in (p.begun_ns, p.ended_ns))]
    assert times == sorted(times)
    assert phases[-1].ended_ns <= parent.ended_ns


def headers(request_id: str) -> dict[str, str]:
    return SSE | {"x-request-id": request_id}


async def test_a_finished_request_is_one_tree(collector: Collector, cluster: Cluster) -> None:
    controller = await traced(cluster, collector, first_delay_s=0.05, delay_s=0.02)
    begun_ns = time.time_ns()
    response = await cluster.client(controller).post(
        PATH, json={"model": "echo", "prompt": SECRET}, headers=headers("finished-1")
    )
    assert response.status_code == 200
    worker = await arrived(collector, WORKER, "finished-1")
    root = await arrived(collector, CONTROLLER, "finished-1")
    assert (root.name, root.parent_id, root.is_server) == ("text_completion echo", "", True)
    assert begun_ns <= root.begun_ns <= root.ended_ns <= time.time_ns()
    assert root.error is None
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "echo",
        "gen_ai.usage.input_tokens": len(SECRET),
        "gen_ai.usage.output_tokens": len(SECRET) + 1,
        "gen_ai.response.finish_reasons": ["stop"],
        "tandem.outcome": "stop",
        "tandem.worker_id": "one",
        "tandem.cached_tokens": 0,
        "tandem.tries": 1,
    }
    assert expected.items() <= root.attributes.items()
    phases = below(collector, root)
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    in_a_row(root, phases)
    assert phases[1].ended_ns - phases[1].begun_ns >= 0.04e9
    assert phases[2].ended_ns - phases[2].begun_ns >= 0.4e9

    assert (worker.trace_id, worker.parent_id) == (root.trace_id, root.span_id)
    assert worker.is_server
    assert worker.attributes["gen_ai.usage.output_tokens"] == len(SECRET) + 1
    parts = below(collector, worker)
    assert [span.name for span in parts] == ["queue", "prefill", "decode"]
    in_a_row(worker, parts)
    assert collector.paths == {"/v1/traces"}
    assert not any(SECRET.encode() in body for body in collector.bodies)


async def test_pictures_are_a_phase_of_the_worker(collector: Collector, cluster: Cluster) -> None:
    controller = await traced(cluster, collector)
    body = {"model": "echo", "prompt": "<image>a", "images": [encoded(picture())]}
    await cluster.client(controller).post(PATH, json=body, headers=headers("picture-1"))
    worker = await arrived(collector, WORKER, "picture-1")
    parts = below(collector, worker)
    assert [span.name for span in parts] == ["queue", "images", "prefill", "decode"]
    in_a_row(worker, parts)
    assert worker.attributes["tandem.images"] == 1


async def test_a_retry_has_its_own_phases(collector: Collector, cluster: Cluster) -> None:
    controller = await traced(cluster, collector)
    await cluster.faulty(controller, b"")  # hangs up, and is asked first
    client = cluster.client(controller)
    response = await client.post(
        PATH, json={"model": "echo", "prompt": "abc"}, headers=headers("retried-1")
    )
    assert response.status_code == 200
    root = await arrived(collector, CONTROLLER, "retried-1")
    worker = await arrived(collector, WORKER, "retried-1")
    assert (root.error, root.attributes["tandem.tries"]) == (None, 2)
    assert root.attributes["tandem.worker_id"] == "one"
    phases = below(collector, root)
    assert [(s.name, s.attributes["tandem.try"], s.error) for s in phases] == [
        ("queue", 1, None),
        ("prefill", 1, "upstream_lost"),
        ("queue", 2, None),
        ("prefill", 2, None),
        ("decode", 2, None),
    ]
    assert phases[1].attributes["tandem.worker_id"] == "faulty-0"
    assert phases[3].attributes["tandem.worker_id"] == "one"
    in_a_row(root, phases)
    assert worker.parent_id == root.span_id


async def test_a_cancelled_request_says_so_on_both_sides(
    collector: Collector, cluster: Cluster
) -> None:
    controller = await traced(cluster, collector, delay_s=0.05)
    client = cluster.client(controller)
    body = {"model": "echo", "prompt": "x" * 200}
    async with client.stream("POST", PATH, json=body, headers=headers("left-1")) as response:
        async for _ in response.aiter_bytes():
            break
    root = await arrived(collector, CONTROLLER, "left-1")
    worker = await arrived(collector, WORKER, "left-1")
    for span in (root, worker):
        assert span.attributes["tandem.outcome"] == "cancelled"
        assert span.error is None  # nobody failed
        assert [part.name for part in below(collector, span)] == ["queue", "prefill", "decode"]
    assert "gen_ai.usage.output_tokens" not in root.attributes
    assert 0 < worker.attributes["gen_ai.usage.output_tokens"] < 200


async def test_a_stream_that_fails_has_the_error_on_its_last_phase(
    collector: Collector, cluster: Cluster
) -> None:
    controller = await traced(cluster, collector, fail_after=30)
    response = await cluster.client(controller).post(
        PATH, json={"model": "echo", "prompt": "x" * 50}, headers=headers("failed-1")
    )
    assert response.status_code == 200
    for service in (CONTROLLER, WORKER):
        span = await arrived(collector, service, "failed-1")
        assert span.error == "engine_failed"
        assert span.attributes["error.type"] == "engine_failed"
        parts = below(collector, span)
        assert [(part.name, part.error) for part in parts] == [
            ("queue", None),
            ("prefill", None),
            ("decode", "engine_failed"),
        ]


async def test_refused_requests_have_a_span(collector: Collector, cluster: Cluster) -> None:
    controller = await traced(cluster, collector, context_length=64)
    client = cluster.client(controller)
    await client.post(PATH, content=b"{nonsense", headers=headers("refused-1"))
    await client.post(PATH, json={"model": SECRET, "prompt": "x"}, headers=headers("refused-2"))
    await client.post(
        PATH, json={"model": "echo", "prompt": "x" * 100}, headers=headers("refused-3")
    )
    root = await arrived(collector, CONTROLLER, "refused-1")
    assert (root.name, root.error) == ("refused", "invalid_request")
    assert below(collector, root) == []
    root = await arrived(collector, CONTROLLER, "refused-2")
    assert (root.name, root.error) == ("text_completion unknown", "model_not_found")
    assert [(s.name, s.error) for s in below(collector, root)] == [("queue", "model_not_found")]
    root = await arrived(collector, CONTROLLER, "refused-3")
    assert [(s.name, s.error) for s in below(collector, root)] == [
        ("queue", None),
        ("prefill", "context_overflow"),
    ]
    worker = await arrived(collector, WORKER, "refused-3")
    assert worker.error == "context_overflow"


async def test_a_clients_own_trace_is_joined(collector: Collector, cluster: Cluster) -> None:
    controller = await traced(cluster, collector)
    trace_id, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    own = {"traceparent": f"00-{trace_id}-{caller}-01", "tracestate": "vendor=1"}
    await cluster.client(controller).post(
        "/v1/chat/completions",
        json={"model": "echo", "messages": [{"role": "user", "content": "hi"}]},
        headers={"x-request-id": "joined-1"} | own,
    )
    root = await arrived(collector, CONTROLLER, "joined-1")
    worker = await arrived(collector, WORKER, "joined-1")
    assert (root.name, root.trace_id, root.parent_id) == ("chat echo", trace_id, caller)
    assert (worker.trace_id, worker.parent_id) == (trace_id, root.span_id)


async def test_a_client_may_have_its_request_left_out(
    collector: Collector, cluster: Cluster
) -> None:
    """The sampling decision in ``traceparent`` holds, and nonsense there starts a new trace."""
    controller = await traced(cluster, collector)
    for request_id, parent in (
        ("unsampled-1", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
        ("garbled-1", "00-\xff-1"),
    ):
        response = await cluster.client(controller).post(
            PATH,
            json={"model": "echo", "prompt": "x"},
            headers=[
                (b"accept", b"text/event-stream"),
                (b"x-request-id", request_id.encode()),
                (b"traceparent", parent.encode("latin-1")),
            ],
        )
        assert response.status_code == 200
    assert (await arrived(collector, CONTROLLER, "garbled-1")).parent_id == ""
    await arrived(collector, WORKER, "garbled-1")
    assert collector.request(CONTROLLER, "unsampled-1") is None
    assert collector.request(WORKER, "unsampled-1") is None


async def test_a_collector_that_is_away_costs_nobody_anything(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are served as fast as ever, it is said once, and the process stops in time."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    nowhere = f"http://127.0.0.1:{free_port()}"
    caplog.set_level(logging.INFO)
    controller = await cluster.controller(otlp_endpoint=nowhere)
    await cluster.worker(controller)
    client = cluster.client(controller)

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if "traces" in r.getMessage()]

    async def complained() -> bool:
        begun_s = time.monotonic()
        assert text(await ask(client, prompt="abc")) == "abc"
        assert time.monotonic() - begun_s < 1
        return bool(said())

    await until(complained)
    for _ in range(20):
        assert text(await ask(client, prompt="abc")) == "abc"
    begun_s = time.monotonic()
    assert await controller.stop() == 0
    assert time.monotonic() - begun_s < 5
    assert said() == ["traces cannot be sent and are dropped"]
    assert not any(r.name.startswith("opentelemetry") for r in caplog.records)


async def test_a_collector_that_hangs_does_not_hold_a_process_that_stops(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked = asyncio.Event()
    over = asyncio.Event()

    async def never(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await over.wait()
        writer.close()

    async with await asyncio.start_server(never, "127.0.0.1", 0) as hanging:
        port = hanging.sockets[0].getsockname()[1]
        controller = await cluster.controller(otlp_endpoint=f"http://127.0.0.1:{port}")
        await cluster.worker(controller)
        assert text(await ask(cluster.client(controller), prompt="abc")) == "abc"
        begun_s = time.monotonic()
        assert await controller.stop() == 0
        assert time.monotonic() - begun_s < 4
        assert asked.is_set()
        over.set()


async def test_the_last_spans_are_sent_when_the_process_stops(
    collector: Collector, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")  # no batch before an hour is over
    controller = await traced(cluster, collector)
    await cluster.client(controller).post(
        PATH, json={"model": "echo", "prompt": "x"}, headers=headers("last-1")
    )
    assert collector.spans == []
    assert await controller.stop() == 0
    assert collector.request(CONTROLLER, "last-1") is not None


LOADED = """
import asyncio, sys
from tests.cluster.conftest import Cluster, ask

async def main():
    cluster = Cluster()
    controller = await cluster.controller()
    await cluster.worker(controller)
    await ask(cluster.client(controller), prompt="abc")
    await cluster.aclose()

asyncio.run(main())
heavy = ("opentelemetry.sdk", "opentelemetry.exporter", "requests")
print(*(name for name in sys.modules if name.startswith(heavy)))
"""


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=20, check=False
    )
    assert (found.returncode, found.stdout) == (0, "\n"), found.stderr


MISSING = """
import sys
sys.modules["opentelemetry.sdk"] = None  # as if it were not installed
from controller.__main__ import main
sys.argv = ["controller", "--port", "0", "--otlp-endpoint", "http://127.0.0.1:4318"]
main()
"""


def test_without_the_libraries_an_endpoint_is_refused() -> None:
    found = subprocess.run(
        [sys.executable, "-c", MISSING], capture_output=True, text=True, timeout=20, check=False
    )
    assert found.returncode == 2, found.stderr
    assert "pip install '.[otel]'" in found.stderr.splitlines()[-1]
