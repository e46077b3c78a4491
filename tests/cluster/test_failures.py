"""What clients see when workers misbehave: a retry they do not notice, or one typed end."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest

from protocol.errors import ERRORS
from protocol.events import Delta, Failed, Finished, encode_sse
from tests.cluster.conftest import (
    END,
    PATH,
    STREAM_HEAD,
    Cluster,
    ask,
    chunk,
    good_stream,
    text,
    until,
)

ONE = chunk(encode_sse(Delta(text="one", token_ids=(1,))))


def refusal(code: str) -> bytes:
    body = orjson.dumps({"error": {"code": code, "message": "a", "remedy": "b"}})
    return b"HTTP/1.1 503 X\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


BEFORE_THE_FIRST_EVENT = {
    "hangs up at once": b"",
    "hangs up after the head": STREAM_HEAD,
    "hangs up inside the first frame": STREAM_HEAD + chunk(b"event: delta\ndata: {"),
    "ends without an event": STREAM_HEAD + END,
    "answers 500": b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\nOops",
    "answers 503 in JSON of its own": b"HTTP/1.1 503 X\r\ncontent-length: 2\r\n\r\n{}",
    "drains": refusal("draining"),
    "has no memory left": refusal("out_of_memory"),
    "speaks something else": b"SSH-2.0-OpenSSH_9.6\r\n",
    "fails first of all": STREAM_HEAD
    + chunk(encode_sse(Failed(code="out_of_memory", message="a", remedy="b")))
    + END,
}


@pytest.mark.parametrize("case", BEFORE_THE_FIRST_EVENT)
async def test_before_the_first_event_another_replica_takes_over(
    cluster: Cluster, case: str
) -> None:
    controller = await cluster.controller()
    faulty = await cluster.faulty(controller, BEFORE_THE_FIRST_EVENT[case])
    await cluster.worker(controller)
    client = cluster.client(controller)
    for _ in range(3):
        assert text(await ask(client, prompt="hello")) == "hello"
    assert faulty.asked >= 1
    await cluster.wait_quiet(controller)


async def test_with_nobody_else_the_failure_itself_is_told(cluster: Cluster) -> None:
    controller = await cluster.controller()
    faulty = await cluster.faulty(controller, b"")
    response = await cluster.client(controller).post(PATH, json={"model": "echo", "prompt": "a"})
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_lost"
    assert faulty.asked == 1, "the same replica is not asked twice"
    await cluster.wait_quiet(controller)


AFTER_IT = {
    "hangs up": STREAM_HEAD + ONE,
    "hangs up inside a frame": STREAM_HEAD + ONE + chunk(b'event: delta\ndata: {"ty'),
    "hangs up inside a chunk": STREAM_HEAD + ONE + b"40\r\nevent: del",
    "ends cleanly without a last word": STREAM_HEAD + ONE + END,
    "sends an event that is none": STREAM_HEAD + ONE + chunk(b"data: nonsense\n\n"),
}


@pytest.mark.parametrize("case", AFTER_IT)
async def test_after_it_there_is_one_typed_end(cluster: Cluster, case: str) -> None:
    controller = await cluster.controller()
    await cluster.faulty(controller, AFTER_IT[case])
    events = await ask(cluster.client(controller), prompt="hello")
    assert events[0] == Delta(text="one", token_ids=(1,))
    assert [type(event) for event in events] == [Delta, Failed]
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "upstream_lost"
    assert events[-1].remedy
    await cluster.wait_quiet(controller)


async def test_it_is_told_in_every_framing(cluster: Cluster) -> None:
    controller = await cluster.controller()
    client = cluster.client(controller)

    async def faulty() -> None:
        # Each breaks once; the controller then finds it well and keeps it.
        await cluster.faulty(controller, STREAM_HEAD + ONE)

    await faulty()
    response = await client.post(PATH, json={"model": "echo", "prompt": "Hi "})
    frames = [orjson.loads(frame) for frame in response.content.split(b"\0") if frame]
    assert frames[0]["text"] == "Hi one"
    assert frames[-1]["error_code"] == 502
    assert frames[-1]["error"]["code"] == "upstream_lost"
    assert "last word" in frames[-1]["text"] or "connection" in frames[-1]["text"]
    assert "high traffic" not in response.text.lower()

    await faulty()
    asked = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}
    response = await client.post("/v1/chat/completions", json=asked | {"stream": True})
    last = response.text.strip().split("\n\n")[-1]
    assert orjson.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_lost"
    assert "[DONE]" not in response.text

    await faulty()
    response = await client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_lost"


async def test_a_worker_that_hangs_before_the_first_event(cluster: Cluster) -> None:
    controller = await cluster.controller(first_event_timeout_s=0.2)
    await cluster.faulty(controller, lambda *_: asyncio.Event().wait())
    response = await cluster.client(controller).post(PATH, json={"model": "echo", "prompt": "a"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    await cluster.wait_quiet(controller)


async def test_a_worker_that_hangs_after_it(cluster: Cluster) -> None:
    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + ONE)
        await asyncio.Event().wait()

    controller = await cluster.controller(event_timeout_s=0.2)
    await cluster.faulty(controller, hang)
    events = await ask(cluster.client(controller), prompt="a")
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "deadline_exceeded"
    await cluster.wait_quiet(controller)


async def test_what_comes_after_the_end_is_dropped(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.faulty(
        controller, STREAM_HEAD + ONE + chunk(encode_sse(Finished(reason="stop")) * 2) + ONE + END
    )
    events = await ask(cluster.client(controller), prompt="a")
    assert [type(event) for event in events] == [Delta, Finished]


async def test_comments_and_split_frames_are_no_trouble(cluster: Cluster) -> None:
    stream = encode_sse(Delta(text="☃", token_ids=(1,))) + b": ping\n\n"
    stream += encode_sse(Finished(reason="stop"))
    pieces = b"".join(chunk(stream[i : i + 7]) for i in range(0, len(stream), 7))
    controller = await cluster.controller()
    await cluster.faulty(controller, STREAM_HEAD + pieces + END)
    events = await ask(cluster.client(controller), prompt="a")
    assert events == [Delta(text="☃", token_ids=(1,)), Finished(reason="stop")]


async def test_a_worker_that_vanishes_is_out_at_once(cluster: Cluster) -> None:
    controller = await cluster.controller()
    faulty = await cluster.faulty(controller, good_stream())
    await faulty.stop()
    await cluster.worker(controller)
    client = cluster.client(controller)
    for _ in range(5):
        assert text(await ask(client, prompt="hello")) == "hello"

    async def gone() -> bool:
        return len((await cluster.state(controller))["workers"]) == 1

    await until(gone)
    assert any(e["what"] == "lost" for e in (await cluster.state(controller))["events"])


async def test_a_stream_keeps_its_slot_until_its_end(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller, limit_model_concurrency=1, delay_s=0.01)
    client = cluster.client(controller)
    answers = await asyncio.gather(*(ask(client, prompt=f"request {n}") for n in range(8)))
    assert [text(events) for events in answers] == [f"request {n}" for n in range(8)]
    await cluster.wait_quiet(controller)
    assert (await cluster.client(worker).post("/worker_get_status")).json()["running"] == 0


@pytest.mark.parametrize("code", ERRORS)
async def test_every_error_is_told_as_itself_and_the_worker_serves_on(
    cluster: Cluster, code: str
) -> None:
    """Before the first event as a status, after it as the last event of the stream."""
    controller = await cluster.controller()
    await cluster.faulty(controller, refusal(code), model_names=["early"])
    await cluster.worker(controller, model_name="late", fail_after=30, fail_with=code)
    client = cluster.client(controller)
    response = await client.post(PATH, json={"model": "early", "prompt": "x"})
    assert response.status_code == ERRORS[code].status
    assert response.json()["error"]["code"] == code
    events = await ask(client, model="late", prompt="x" * 50)
    assert isinstance(events[-1], Failed)
    assert events[-1].code == code
    assert text(events) == "x" * 30
    assert text(await ask(client, model="late", prompt="short")) == "short"
    await cluster.wait_quiet(controller)


async def test_a_refusal_that_holds_everywhere_is_not_retried(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, context_length=64)
    await cluster.worker(controller, context_length=64)
    client = cluster.client(controller)
    response = await client.post(PATH, json={"model": "echo", "prompt": "a" * 100})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "context_overflow"
    metrics = (await client.get("/metrics")).text
    assert "tandem_retries_total 0.0" in metrics
    assert 'tandem_requests_total{model="echo",outcome="context_overflow"} 1.0' in metrics


async def test_a_slow_reader_does_not_fill_the_controllers_memory(cluster: Cluster) -> None:
    """The controller stops reading from the worker when its client does not read."""
    sent = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(STREAM_HEAD)
        piece = chunk(encode_sse(Delta(text="x" * 8000, token_ids=(1,))))
        while True:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    controller = await cluster.controller()
    await cluster.faulty(controller, flood)
    client = cluster.client(controller)
    async with client.stream(
        "POST", PATH, json={"model": "echo", "prompt": "a"}, headers={"accept": "text/event-stream"}
    ) as response:
        assert response.status_code == 200
        before = -1
        while sent != before:  # until the flood is dammed
            before = sent
            await asyncio.sleep(0.1)  # sleep: dammed means that nothing moves for a while
        assert 0 < sent < 64 << 20
    await cluster.wait_quiet(controller)


async def test_a_client_that_leaves_while_its_request_waits(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller, limit_model_concurrency=1, delay_s=0.05)
    client = cluster.client(controller)
    first = asyncio.create_task(ask(client, prompt="x" * 60))

    async def load(name: str, value: int) -> bool:
        return bool((await cluster.state(controller))["load"][name] == value)

    await until(lambda: load("inflight", 1))
    with pytest.raises(httpx.ReadTimeout):
        await cluster.client(controller, timeout_s=0.2).post(
            PATH, json={"model": "echo", "prompt": "b"}
        )
    await until(lambda: load("waiting", 0))
    assert not first.done(), "the one that runs is not disturbed"
    assert text(await first) == "x" * 60
    await cluster.wait_quiet(controller)
    assert (await cluster.client(worker).post("/worker_get_status")).json()["running"] == 0


async def test_a_client_that_leaves_during_prefill_frees_the_worker(cluster: Cluster) -> None:
    controller = await cluster.controller()
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"", "the controller hangs up"
        left.set()

    await cluster.faulty(controller, silent)
    with pytest.raises(httpx.ReadTimeout):
        await cluster.client(controller, timeout_s=0.2).post(
            PATH, json={"model": "echo", "prompt": "b"}
        )
    async with asyncio.timeout(5):
        await left.wait()
    await cluster.wait_quiet(controller)


async def test_a_client_that_leaves_between_tokens_frees_the_worker(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, delay_s=0.02)
    client = cluster.client(controller)
    fields = {"model": "echo", "prompt": "x" * 4000, "max_new_tokens": 4000}
    for _ in range(5):
        async with client.stream("POST", PATH, json=fields) as response:
            await anext(response.aiter_bytes())
        await cluster.wait_quiet(controller)
