"""What every process of a cluster does around its work: listen, serve, stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from transport.exits import usage_error
from transport.tls import Tls

_ACCEPTS_PER_TURN = 16

log = logging.getLogger("tandem")


def bind(host: str, port: int | None, *, first_free: int = 0) -> socket.socket:
    """A listening socket on ``port``; when it is ``None``, on the first free one from
    ``first_free`` up (0: any).

    A port that is taken ends the process with a sentence and exit code 2.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    candidates = [port] if port is not None else range(first_free, first_free + 1000)
    for candidate in candidates:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, candidate))
            sock.listen(4096)  # may be refused too: two can bind at the same moment
        except OSError as exc:
            sock.close()
            if exc.errno == errno.EADDRINUSE and port is None:
                continue
            reason = "is taken by another process" if exc.errno == errno.EADDRINUSE else str(exc)
            usage_error(f"{host}:{candidate} {reason}; choose another with --port.")
        sock.setblocking(False)
        return sock
    usage_error(f"No free port from {first_free} to {first_free + 999} on {host}.")


def free_port(host: str = "127.0.0.1") -> int:
    """A port of ``host`` that nobody listens on now, for a process that cannot be handed a socket.

    Raises:
        OSError: ``host`` is no address of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: signals are the process's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """A uvicorn server on a bound socket, started and stopped by its owner."""

    def __init__(
        self, app: ASGIApp, sock: socket.socket, *, grace_s: float, tls: Tls | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http="httptools",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(grace_s)),
            lifespan="off",
            backlog=4096,
            **(tls.options() if tls is not None else {}),
        )
        self._uvicorn = _Server(config)
        # uvloop accepts one connection a turn of the loop for each socket it watches. Under load
        # a turn is long and newcomers would wait for seconds, so it watches this one many times.
        self._socks = [sock, *(sock.dup() for _ in range(_ACCEPTS_PER_TURN - 1))]
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when requests are accepted; cancelled, it leaves nothing that listens."""
        self._task = asyncio.create_task(self._uvicorn.serve(sockets=self._socks))
        try:
            await self._started(self._task)
        except asyncio.CancelledError:
            await self._started(self._task)  # uvicorn gives back only what it has finished taking
            await self.kill()
            raise

    async def _started(self, task: asyncio.Task[None]) -> None:
        while not self._uvicorn.started:
            if task.done():
                task.result()
                raise RuntimeError("the server ended while it was starting")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop listening, let open requests end within the grace period, then cancel them."""
        if self._task is not None:
            self._uvicorn.should_exit = True
            await self._task

    async def kill(self) -> None:
        """Stop listening and cancel open requests at once; harmless after ``stop``."""
        self._uvicorn.force_exit = True
        for task in list(self._uvicorn.server_state.tasks):
            task.cancel()
        await self.stop()


def run(main: Callable[[StopSignal], Awaitable[int]]) -> NoReturn:
    """Run ``main`` on uvloop and exit with the code it returns."""
    import uvloop

    async def supervised() -> int:
        return await main(StopSignal())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(supervised())
        others = [
            t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()
        ]
        if others:
            # One that loads a model or downloads it would hold the process until it is done.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
    raise SystemExit(code)


async def first_of(*awaitables: Awaitable[object]) -> None:
    """Return when the first has ended, raising its exception if it has one; cancel the others."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class StopSignal:
    """SIGTERM and SIGINT as something to wait for; the second one means: at once."""

    def __init__(self) -> None:
        self._count = 0
        self._first = asyncio.Event()
        self._second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._count += 1
        (self._first if self._count == 1 else self._second).set()

    @property
    def given(self) -> bool:
        return self._first.is_set()

    async def wait(self) -> None:
        await self._first.wait()

    async def wait_impatient(self) -> None:
        await self._second.wait()
