"""Requests over real HTTP streams, and what came of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import orjson
import uvloop

from protocol.errors import TandemError
from protocol.events import SSE_MEDIA_TYPE, Delta, Event, SseDecoder
from protocol.messages import GenerateRequest
from transport import credentials
from transport.client import HttpPool

PATH = "/worker_generate_stream"
ANSWER_S = 600.0  # the longest silence of a stream

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as its client saw it; times are of ``time.perf_counter``.

    ``token_at`` holds when each of ``token_ids`` arrived. ``end`` is ``stop`` or ``length``,
    ``left`` when the client went away, or the code of the error.
    """

    end: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    token_at: tuple[float, ...] = ()
    sent_at: float = 0.0
    ended_at: float = 0.0
    message: str = ""  # of the error
    logprobs: tuple[float, ...] = ()  # of each of token_ids, if they were asked for
    likeliest: tuple[dict[int, float], ...] = ()  # and of the tokens that might have been, by id

    @property
    def ttft_s(self) -> float | None:
        return self.token_at[0] - self.sent_at if self.token_at else None


def body_of(request: GenerateRequest) -> bytes:
    return request.model_dump_json(exclude_unset=True).encode()


class Client:
    """Connections kept between requests, on a loop that runs only while they do."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._pool = HttpPool(
            headers=[(k.encode(), v.encode()) for k, v in credentials.from_environment().items()]
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._pool.close()
        self._runner.close()

    def together(self, address: str, requests: Sequence[Asked]) -> list[Answer]:
        """The answers to requests that share the worker; returns when all have ended."""
        return self._run(self._together(address, requests))

    def one(self, address: str, body: bytes) -> Answer:
        return self._run(self._ask(address, Asked(body)))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _together(self, address: str, requests: Sequence[Asked]) -> list[Answer]:
        return await asyncio.gather(*(self._ask(address, asked) for asked in requests))

    async def _ask(self, address: str, asked: Asked) -> Answer:
        if asked.delay_s:
            await asyncio.sleep(asked.delay_s)
        sent_at = time.perf_counter()
        chunks: list[tuple[float, bytes]] = []
        end = message = ""
        try:
            async with asyncio.timeout(asked.leave_s):
                end, message = await self._read(address, asked, chunks)
        except TimeoutError:
            end = "left"
        except TandemError as error:
            end, message = error.code, error.message
        return asked.decode(chunks, sent_at, end, message)

    async def _read(
        self, address: str, asked: Asked, chunks: list[tuple[float, bytes]]
    ) -> tuple[str, str]:
        """Gather the stream into ``chunks``; code and sentence of a refusal, if it is one.

        Nothing is decoded before the end: the worker and we share the cores.
        """
        accept = [(b"accept", SSE_MEDIA_TYPE.encode())]
        upstream = await self._pool.open(
            address, asked.path, asked.body, accept, timeout_s=ANSWER_S
        )
        try:
            if upstream.status != 200:
                refusal = orjson.loads(await upstream.read_all(ANSWER_S))["error"]
                return str(refusal["code"]), refusal["message"]
            while data := await upstream.read(ANSWER_S):
                chunks.append((time.perf_counter(), data))
        finally:
            upstream.close()
        return "", ""


Chunks = Sequence[tuple[float, bytes]]
"""What a stream brought, each part with the time of its arrival."""


def answer_of(chunks: Chunks, sent_at: float, end: str = "", message: str = "") -> Answer:
    """Decode a worker's stream.

    ``end`` is known already when the stream did not get to its own.
    """
    decoder = SseDecoder()
    texts: list[str] = []
    ids: list[int] = []
    times: list[float] = []
    logprobs: list[float] = []
    likeliest: list[dict[int, float]] = []
    last: Event | None = None
    for at, data in chunks:
        for event in decoder.feed(data):
            last = event
            if isinstance(event, Delta):
                texts.append(event.text)
                ids += event.token_ids
                times += [at] * len(event.token_ids)
                for entry in event.logprobs or ():
                    logprobs.append(entry.logprob)
                    likeliest.append({top.token_id: top.logprob for top in entry.top})
    if last is not None and not isinstance(last, Delta):  # it was complete, whatever came after
        if last.type == "finished":
            end = last.reason
        else:
            end, message = last.code, last.message
    return Answer(
        end=end or "cut",
        text="".join(texts),
        token_ids=tuple(ids),
        token_at=tuple(times),
        sent_at=sent_at,
        ended_at=chunks[-1][0] if chunks else sent_at,
        message=message,
        logprobs=tuple(logprobs),
        likeliest=tuple(likeliest),
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to send after ``delay_s``, by a client that leaves ``leave_s`` later."""

    body: bytes
    delay_s: float = 0.0
    leave_s: float | None = None
    path: str = PATH
    decode: Callable[[Chunks, float, str, str], Answer] = answer_of
