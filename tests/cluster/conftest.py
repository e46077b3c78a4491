"""A cluster inside the test's own event loop: real sockets, echo workers, and faulty ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
import orjson
import pytest

from controller.__main__ import serve
from controller.settings import ControllerSettings
from protocol.events import SSE_MEDIA_TYPE, Delta, Event, Finished, SseDecoder, encode_sse
from transport.process import free_port
from workers.echo.engine import EchoEngine
from workers.echo.settings import EchoSettings
from workers.runner import _Worker

PATH = "/worker_generate_stream"
SSE = {"accept": SSE_MEDIA_TYPE}


async def until(
    check: Callable[[], Awaitable[Any]], *, timeout_s: float = 10, what: str = ""
) -> Any:
    """Poll ``check`` until it returns something true, and return that."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                if found := await check():
                    return found
            except (httpx.HTTPError, StopAsyncIteration):
                pass
            await asyncio.sleep(0.01)
    raise AssertionError(what)


class Stop:
    """The signal a process would get."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    @property
    def given(self) -> bool:
        return self.first.is_set()

    async def wait(self) -> None:
        await self.first.wait()

    async def wait_impatient(self) -> None:
        await self.second.wait()


class Running:
    """A controller or a worker, running in this loop."""

    def __init__(self, port: int, task: asyncio.Task[int], stop: Stop) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}"
        self._task = task
        self._stop = stop

    async def stop(self) -> int:
        """SIGTERM: drain and end."""
        self._stop.first.set()
        return await self._task

    async def vanish(self) -> None:
        """As near to ``kill -9`` as one process can come."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


class FaultyWorker:
    """A worker whose answer to a generation is a script; its status is that of a good one."""

    def __init__(self, script: Script, status: dict[str, Any]) -> None:
        self._script = script
        self._status = status
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.address = ""
        self.asked = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def watched(self) -> bool:
        return bool(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] = asyncio.current_task()  # type: ignore[assignment]
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
            if head.startswith(b"POST " + PATH.encode()):
                self.asked += 1
                await self._script(reader, writer)
            else:
                body = orjson.dumps(self._status)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()  # and end well: asyncio.streams mishandles a cancelled task
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def good_stream(text: str = "fine") -> bytes:
    events: list[Event] = [Delta(text=letter, token_ids=(ord(letter),)) for letter in text]
    frames = [chunk(encode_sse(event)) for event in [*events, Finished(reason="stop")]]
    return STREAM_HEAD + b"".join(frames) + END


class Cluster:
    """Starts things and stops them again; ``client`` talks to the controller."""

    def __init__(self) -> None:
        self._running: list[Running] = []
        self._faulty: list[FaultyWorker] = []
        self._clients: dict[tuple[str, float], httpx.AsyncClient] = {}

    async def controller(self, *, port: int | None = None, **settings: Any) -> Running:
        port = free_port() if port is None else port
        # The lottery: a faulty worker of great speed is then asked first.
        made = ControllerSettings(port=port, **{"dispatch_method": "lottery"} | settings)
        stop = Stop()
        task = asyncio.create_task(serve(made, stop))  # type: ignore[arg-type]
        running = Running(port, task, stop)
        self._running.append(running)
        await self._healthy(running)
        return running

    async def worker(
        self,
        *controllers: Running,
        port: int | None = None,
        engine: type[EchoEngine] = EchoEngine,
        **settings: Any,
    ) -> Running:
        port = free_port() if port is None else port
        made = EchoSettings(
            port=port,
            controller_address=tuple(c.address for c in controllers) or ("http://127.0.0.1:1",),
            no_register=not controllers,
            **settings,
        )
        stop = Stop()
        worker = _Worker(made, engine(made))
        task = asyncio.create_task(worker.run(stop))  # type: ignore[arg-type]
        running = Running(port, task, stop)
        self._running.append(running)
        await self._healthy(running)
        for controller in controllers:
            await self.wait_listed(controller, running.address)
        return running

    async def faulty(
        self, controller: Running, script: Script | bytes, **status: Any
    ) -> FaultyWorker:
        """Register a worker that answers with ``script``: bytes to write before it hangs up."""
        if isinstance(script, bytes):
            data = script

            async def write(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(data)
                await writer.drain()

            script = write
        defaults: dict[str, Any] = {
            "model_names": ["echo"],
            "speed": 1e9,  # so that it is asked first
            "queue_length": 0,
            "worker_id": f"faulty-{len(self._faulty)}",
            "epoch": len(self._faulty) + 1,
            "kind": "echo",
            "capacity": 4,
            "capabilities": {"chat": True, "images": True},
            "protocol_version": 1,
        }
        worker = FaultyWorker(script, defaults | status)
        self._faulty.append(worker)
        await worker.start()
        client = self.client(controller)
        response = await client.post("/register_worker", json={"worker_name": worker.address})
        assert response.status_code == 200, response.text
        await until(worker.watched)  # the controller's tripwire stands
        return worker

    def client(self, running: Running, timeout_s: float = 20) -> httpx.AsyncClient:
        key = (running.address, timeout_s)
        if key not in self._clients:  # each reads its certificates, which takes a while
            self._clients[key] = httpx.AsyncClient(
                base_url=running.address, timeout=timeout_s, trust_env=False
            )
        return self._clients[key]

    async def _healthy(self, running: Running) -> None:
        client = self.client(running)

        async def healthy() -> bool:
            if running._task.done():
                running._task.result()
            return (await client.get("/healthz")).status_code == 200

        await until(healthy)

    async def wait_listed(self, controller: Running, address: str) -> None:
        """Until the worker at ``address`` is ready at ``controller``."""

        async def listed() -> bool:
            workers = (await self.state(controller))["workers"]
            return any(w["address"] == address and w["state"] == "ready" for w in workers)

        await until(listed)

    async def state(self, controller: Running) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client(controller).get("/cluster")).json()
        return found

    async def wait_quiet(self, controller: Running) -> None:
        """Until nothing waits and nothing is in flight, at the controller and at each worker."""

        async def quiet() -> bool:
            state = await self.state(controller)
            await self.client(controller).post("/refresh_all_workers")
            return state["load"] == {"waiting": 0, "waiting_bytes": 0, "inflight": 0} and all(
                worker["inflight"] == worker["running"] == worker["waiting"] == 0
                for worker in state["workers"]
            )

        await until(quiet)

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        for running in reversed(self._running):
            running._stop.second.set()
            await running.vanish()
        for worker in self._faulty:
            await worker.stop()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    try:
        yield cluster
    finally:
        await cluster.aclose()


async def ask(client: httpx.AsyncClient, **fields: Any) -> list[Event]:
    """The events of a request that is answered with a stream."""
    response = await client.post(PATH, json={"model": "echo"} | fields, headers=SSE)
    assert response.status_code == 200, response.text
    decoder = SseDecoder()
    events = decoder.feed(response.content)
    assert not decoder.pending
    return events


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))
