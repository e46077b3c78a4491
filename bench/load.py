"""Requests under a load: a closed loop of users, or an open loop of arrivals, over real HTTP.

Closed: each user sends the next request when the last one has ended. Open: requests are sent when
they are due, whatever has become of those before. Nothing is decoded and no body is written while
the clock runs. How late the generator itself was is measured: in a run it also asks for a wake-up
every 50 ms and notes how much later than that it came (``lag_s``).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvloop

from bench.wire import Exchange

CONNECT_S = 10.0
SILENCE_S = 300.0  # the longest a stream may say nothing
_TICK_S = 0.05


@dataclass(frozen=True, slots=True)
class Sending:
    """A request, written: where it goes, with what, and how many images it holds.

    ``number`` comes back in its exchange.
    """

    url: str
    headers: Mapping[str, str]
    body: bytes
    images: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one load."""

    exchanges: tuple[Exchange, ...]
    lag_s: tuple[float, ...]
    cpu_s: float  # of the generator itself


Told = Callable[[], None]
"""Called when a request has ended: a progress bar."""


def closed(users: Sequence[Iterable[Sending]], told: Told = lambda: None) -> Run:
    """Each of ``users`` sends its requests one after the other; returns when all have ended.

    Users may share one iterator: then whoever is free takes the next.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the requests that run are left.
    """

    async def work(session: aiohttp.ClientSession, done: list[Exchange]) -> None:
        async def user(requests: Iterator[Sending]) -> None:
            for request in requests:
                done.append(await _exchange(session, request, time.perf_counter()))
                told()

        await asyncio.gather(*(user(iter(requests)) for requests in users))

    return _run(work)


def opened(arrivals: Sequence[tuple[float, Sending]], told: Told = lambda: None) -> Run:
    """Send each request at its seconds from the start; returns when all have ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the requests that run are left.
    """

    async def work(session: aiohttp.ClientSession, done: list[Exchange]) -> None:
        begun_at = time.perf_counter()

        async def one(due_at: float, request: Sending) -> None:
            done.append(await _exchange(session, request, due_at))
            told()

        async with asyncio.TaskGroup() as group:
            for at_s, request in arrivals:
                due_at = begun_at + at_s
                if (wait_s := due_at - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(one(due_at, request))

    return _run(work)


Work = Callable[[aiohttp.ClientSession, list[Exchange]], Coroutine[Any, Any, None]]


def _run(work: Work) -> Run:
    done: list[Exchange] = []
    lags: list[float] = []

    async def main() -> bool:
        """Whether it was not stopped."""
        loop = asyncio.get_running_loop()
        ours = asyncio.current_task()
        assert ours is not None
        loop.add_signal_handler(signal.SIGINT, ours.cancel)
        try:
            await measured()
        except asyncio.CancelledError:
            return False
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        return True

    async def measured() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=1 << 20
        ) as session:
            ticker = asyncio.create_task(_tick(lags))
            try:
                await work(session, done)
            finally:
                ticker.cancel()
                with suppress(asyncio.CancelledError):
                    await ticker

    before = time.process_time()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if not runner.run(main()):
            raise KeyboardInterrupt
    return Run(tuple(done), tuple(lags), time.process_time() - before)


async def _tick(lags: list[float]) -> None:
    while True:
        due_at = time.perf_counter() + _TICK_S
        await asyncio.sleep(_TICK_S)
        lags.append(time.perf_counter() - due_at)


async def _exchange(session: aiohttp.ClientSession, request: Sending, due_at: float) -> Exchange:
    """Send and read to the end; a failure is an exchange too."""
    chunks: list[tuple[float, bytes]] = []
    status = 0
    error = message = ""
    sent_at = time.perf_counter()
    try:
        async with session.post(
            request.url, data=request.body, headers=request.headers
        ) as response:
            status = response.status
            async for data in response.content.iter_any():
                chunks.append((time.perf_counter(), data))  # noqa: PERF401  # kept if it breaks off
    except aiohttp.ClientConnectorError as exc:
        error, message = "unreachable", str(exc)
    except TimeoutError as exc:
        error, message = "silent", str(exc)
    except (aiohttp.ClientError, OSError) as exc:
        error, message = "lost", f"{type(exc).__name__}: {exc}"
    return Exchange(
        due_at=due_at,
        sent_at=sent_at,
        ended_at=time.perf_counter(),
        images=request.images,
        status=status,
        chunks=chunks,
        error=error,
        message=message,
        number=request.number,
    )
