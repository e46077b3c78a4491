"""A client process: many connections, every reply checked."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from urllib.parse import urlsplit

import uvloop

from bench.soak.exchanges import GOOD, Exchange, bad_exchange, good_exchange

_LAST_CHUNK = b"\r\n0\r\n\r\n"


class Reply(asyncio.Protocol):
    """One connection: sends a request, gathers the whole response, decodes it once at its end."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ended: asyncio.Future[None] | None = None
        self.first_at: float | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is none by inheritance

    async def fetch(self, request: bytes) -> None:
        """Send, and return when the response is complete or the connection has ended."""
        assert self.transport is not None
        self._buffer.clear()
        self.first_at = None
        self._ended = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._ended

    def data_received(self, data: bytes) -> None:
        if self.first_at is None:
            self.first_at = time.monotonic()
        self._buffer += data
        if self.complete:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    @property
    def complete(self) -> bool:
        if self._buffer.endswith(_LAST_CHUNK):
            return True
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        name = b"\r\ncontent-length: "
        if not found or name not in head.lower():
            return False
        return len(body) >= int(head.lower().split(name)[1].split(b"\r\n")[0])

    @property
    def silent(self) -> bool:
        return not self._buffer

    def decoded(self) -> tuple[int, bytes]:
        """Status and body."""
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" not in head.lower():
            return status, rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return status, body


@dataclass(frozen=True, slots=True)
class Plan:
    """What one client process does."""

    address: str
    streams: int
    requests: int
    leave: float
    bad: float
    min_tokens: int
    max_tokens: int
    timeout_s: float
    seed: int


@dataclass(slots=True)
class Tally:
    """What one client process has seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    duration_s: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


class Client:
    """``plan.streams`` connections that share ``plan.requests`` requests."""

    def __init__(self, plan: Plan, stop: Event) -> None:
        self._plan = plan
        self._stop = stop
        self._rng = random.Random(plan.seed)
        self._left = plan.requests
        self._where = urlsplit(plan.address)
        self.tally = Tally()

    async def run(self, tell: Callable[[Counter[str]], None]) -> None:
        streams = [asyncio.create_task(self._stream()) for _ in range(self._plan.streams)]
        everything = asyncio.gather(*streams)
        while not everything.done():
            await asyncio.wait([everything], timeout=0.5)
            tell(self.tally.outcomes)
            if self._stop.is_set():
                self._left = 0
        everything.result()

    async def _stream(self) -> None:
        reply: Reply | None = None
        await asyncio.sleep(self._rng.random())  # not all in the same instant
        while self._left > 0:
            self._left -= 1
            if reply is None or reply.transport is None or reply.transport.is_closing():
                try:
                    reply = await self._connect()
                except OSError as exc:
                    self._note("lost", f"connect: {exc}")
                    continue
            if not await self._request(reply):
                reply = None
        if reply is not None and reply.transport is not None:
            reply.transport.close()

    async def _connect(self) -> Reply:
        loop = asyncio.get_running_loop()
        where = self._where
        _, reply = await loop.create_connection(Reply, where.hostname or "", where.port or 80)
        return reply

    async def _request(self, reply: Reply) -> bool:
        """One exchange; whether the connection can be used again."""
        plan, rng = self._plan, self._rng
        bad = rng.random() < plan.bad
        leaves = not bad and rng.random() < plan.leave
        exchange = (
            bad_exchange(rng) if bad else good_exchange(rng, plan.min_tokens, plan.max_tokens)
        )
        begun_at = time.monotonic()
        # Who leaves does so at a random moment of a typical answer's life, or before it begins.
        typical_s = self.tally.duration_s[-1] if self.tally.duration_s else 0.5
        limit_s = rng.uniform(0, typical_s) if leaves else plan.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await reply.fetch(exchange.request)
        except TimeoutError:
            assert reply.transport is not None
            reply.transport.abort()
            self._note("left" if leaves else "timeout", "")
            return False
        outcome, detail = self._judge(reply, exchange)
        self._note(outcome, detail)
        if outcome == "ok" and reply.first_at is not None:
            self.tally.ttft_s.append(reply.first_at - begun_at)
            self.tally.duration_s.append(time.monotonic() - begun_at)
        return outcome in ("ok", "bad_ok", "refused")

    def _judge(self, reply: Reply, exchange: Exchange) -> tuple[str, str]:
        if reply.silent:
            return "lost", "the connection ended without a reply"
        if not reply.complete:
            return "cut", bytes(reply._buffer[-200:]).decode(errors="replace")
        try:
            status, body = reply.decoded()
            outcome = exchange.check(status, body)
        except (ValueError, LookupError, TypeError) as exc:
            return "wrong", f"{type(exc).__name__}: {exc}"
        return outcome, f"{status} {body[-200:].decode(errors='replace')}"

    def _note(self, outcome: str, detail: str) -> None:
        self.tally.outcomes[outcome] += 1
        if outcome not in GOOD and len(self.tally.examples) < 5:
            self.tally.examples.append(f"{outcome}: {detail}")


def client_main(plan: Plan, pipe: Connection, stop: Event) -> None:
    """A client process; the parent decides when Ctrl-C means stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    client = Client(plan, stop)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(client.run(lambda outcomes: pipe.send(dict(outcomes))))
    pipe.send(client.tally)
    pipe.close()
