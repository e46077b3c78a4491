"""What SGLang says, as our events and errors. The sentences are those of 0.5.23."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from protocol.errors import (
    BadImage,
    ContextOverflow,
    EngineFailed,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    TandemError,
    UpstreamLost,
)
from workers.sglang.client import AnswerTooLong, SglangClient, parse, refusal


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (
            400,
            "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
            ContextOverflow,
        ),
        (
            400,
            "Input length (4092 tokens) exceeds the maximum allowed length (4090 tokens). Use a "
            "shorter input or enable --allow-auto-truncate.",
            ContextOverflow,
        ),
        (
            400,
            "Multimodal prompt is too long after expanding multimodal tokens. After expanding "
            "len(req.origin_input_ids_unpadded)=4093 => 4093 >= 4090.",
            ContextOverflow,
        ),
        (400, "Request prompt exceeds the KV memory budget: input_len=9.", ContextOverflow),
        (
            400,
            "Requested token count exceeds the model's maximum context length of 4096 tokens. You "
            "requested a total of 5040 tokens: ...",
            AnswerTooLong,
        ),
        (400, "Prompt has 2 image placeholders but 1 image inputs were provided", InvalidRequest),
        (
            400,
            "An exception occurred while loading IMAGE data at index 0: Error while loading data: "
            "Could not decode image: cannot identify image file",
            BadImage,
        ),
        (503, "The request queue is full.", Overloaded),
        (500, "CUDA out of memory. Tried to allocate 2 GiB", OutOfMemory),
        (500, "division by zero", EngineFailed),
    ],
)
def test_refusals(status: int, message: str, error: type[Exception]) -> None:
    assert type(refusal(status, message)) is error


def frame(**meta: Any) -> dict[str, Any]:
    return {
        "output_ids": [5, 6],
        "meta_info": {"finish_reason": None, "prompt_tokens": 9, "cached_tokens": 4, **meta},
    }


def test_a_chunk() -> None:
    chunk = parse(frame())
    assert (chunk.token_ids, chunk.reason) == ((5, 6), None)
    assert (chunk.prompt_tokens, chunk.cached_tokens) == (9, 4)


def test_a_cumulative_chunk_gives_what_is_new() -> None:
    assert parse(frame(), skip=1).token_ids == (6,)


LOGPROBS = {
    "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None]],
    "output_top_logprobs": [[[-0.5, 5, None]], [[-0.1, 7, None]]],
}


def test_logprobs_are_those_of_the_chunks_tokens() -> None:
    assert parse(frame()).logprobs is None
    assert parse(frame(**LOGPROBS)).logprobs == ((-0.5, ((5, -0.5),)), (-1.5, ((7, -0.1),)))
    assert parse(frame(**LOGPROBS), skip=1).logprobs == ((-1.5, ((7, -0.1),)),)


def test_logprobs_of_the_chosen_tokens_alone() -> None:
    own = {"output_token_logprobs": LOGPROBS["output_token_logprobs"]}
    assert parse(frame(**own)).logprobs == ((-0.5, ()), (-1.5, ()))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_last_chunk(reason: str) -> None:
    assert parse(frame(finish_reason={"type": reason})).reason == reason


def test_an_abort_is_an_error() -> None:
    reason = {"type": "abort", "message": "Abort in waiting queue", "status_code": None}
    with pytest.raises(EngineFailed, match="Abort in waiting queue"):
        parse(frame(finish_reason=reason))


def test_an_error_frame() -> None:
    with pytest.raises(InvalidRequest, match="min_p must be in"):
        parse({"error": {"message": "min_p must be in [0, 1], got 3", "code": 400}})


# ---------------------------------------------------------------- over a connection


@asynccontextmanager
async def answering(answer: bytes | None) -> AsyncIterator[tuple[SglangClient, asyncio.Event]]:
    """A client of a server that sends ``answer`` to each request, if anything.

    The event is set when a request has come.
    """
    come = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if answer is not None:
                writer.write(answer)
            come.set()
            await reader.read()  # to the end of the connection
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = SglangClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", silence_s=60)
    try:
        yield client, come
    finally:
        await client.aclose()
        server.close()
        await server.wait_closed()


async def all_chunks(client: SglangClient) -> None:
    async with aclosing(client.generate({})) as chunks:
        async for _ in chunks:
            pass


REFUSED = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 10\r\n\r\n{"
BEGUN = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [None, REFUSED, BEGUN], ids=["mute", "refused", "begun"])
async def test_a_cut_ends_every_wait(answer: bytes | None) -> None:
    async with answering(answer) as (client, come):
        waiting = asyncio.create_task(all_chunks(client))
        await come.wait()
        while answer is not None and not client._streams:  # noqa: ASYNC110 - until it has the head
            await asyncio.sleep(0.01)
        client.cut()
        with pytest.raises(UpstreamLost):
            await asyncio.wait_for(waiting, 5)
        assert client.awaited_s == 0


@pytest.mark.anyio
async def test_nothing_begins_after_a_cut() -> None:
    async with answering(BEGUN) as (client, come):
        client.cut()
        with pytest.raises(UpstreamLost, match="was cut"):
            await all_chunks(client)
        assert not come.is_set()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        ("400 Bad Request", Overloaded, "only while no request runs"),
        ("401 Unauthorized", EngineFailed, "/flush_cache with status 401"),
        ("500 Internal Server Error", EngineFailed, "/flush_cache with status 500"),
    ],
)
async def test_a_cache_that_is_not_flushed(
    status: str, error: type[TandemError], words: str
) -> None:
    head = f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode()
    async with answering(head) as (client, _):
        with pytest.raises(error, match=words):
            await client.flush_cache()


@pytest.mark.anyio
async def test_adapters_under_way_are_counted() -> None:
    async with answering(None) as (client, come):
        loading = asyncio.create_task(client.load_adapter("a", "/a"))
        await come.wait()
        assert client.adapters_changing == 1
        loading.cancel()
        await asyncio.wait([loading])
        assert client.adapters_changing == 0


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"[]", b'{"loads": ["busy"]}', b"<html>"])
async def test_a_load_that_is_none_is_an_error(answer: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer)
    async with answering(head + answer) as (client, _):
        with pytest.raises(EngineFailed, match="does not tell its load"):
            await client.load()
