"""The life of a worker process: serve, load, register, work, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from typing import NoReturn, Protocol

from protocol.errors import TandemError
from transport import process, tracing
from transport.addresses import address_of, bare
from transport.credentials import Guard, is_loopback
from transport.exits import EXIT_ENGINE_DIED, EXIT_START_FAILED
from transport.membership import Membership
from workers.engine import Engine
from workers.server import create_app
from workers.settings import WorkerSettings
from workers.shell import Shell

log = logging.getLogger(__name__)

FIRST_PORT = 40000


class KindEngine(Engine, Protocol):
    """An engine that says which kind of worker it makes."""

    kind: str


def run_worker(settings: WorkerSettings, engine: KindEngine) -> NoReturn:
    """Serve ``engine`` until SIGTERM, Ctrl-C or its death; exits the process."""
    process.run(lambda stop: _Worker(settings, engine).run(stop))


class _Worker:
    def __init__(self, settings: WorkerSettings, engine: KindEngine) -> None:
        self._settings = settings
        self._engine = engine
        self._sock = process.bind(settings.host, settings.port, first_free=FIRST_PORT)
        self._address = settings.worker_address or address_of(self._sock)
        self._shell = Shell(engine, engine.kind, self._worker_id(), settings, self._announce)
        addresses = () if settings.no_register else settings.controller_address
        self._memberships = [
            Membership(
                address,
                self._address,
                self._shell.status,
                heartbeat_s=settings.heartbeat_s,
                token=settings.cluster_token,
            )
            for address in addresses
        ]

    def _worker_id(self) -> str:
        if self._settings.worker_id is not None:
            return self._settings.worker_id
        host, port = self._sock.getsockname()[:2]
        place = "" if is_loopback(host) else f"{socket.gethostname()}-"
        return f"{self._engine.kind}-{place}{port}"

    async def run(self, stop: process.StopSignal) -> int:
        """Returns the exit code of the process."""
        settings = self._settings
        tracer = await tracing.connect(
            settings.otlp_endpoint, service="tandem-worker", instance=self._shell.worker_id
        )
        self._shell.tracer = tracer
        app = Guard(create_app(self._shell), settings.cluster_token, local=settings.local)
        server = process.Server(app, self._sock, grace_s=1)
        await server.start()
        address = bare(self._address)
        log.info("listening", extra={"address": address, "kind": self._engine.kind})
        tasks = [asyncio.create_task(m.run()) for m in self._memberships]
        try:
            return await self._work(stop)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.kill()
            await self._engine.aclose()
            if tracer is not None:
                await tracer.aclose()

    def _announce(self) -> None:
        """Tell the controllers of a change of state at once."""
        for membership in self._memberships:
            membership.beat_soon()

    async def _work(self, stop: process.StopSignal) -> int:
        try:
            await process.first_of(self._load(), stop.wait())
        except TandemError as error:
            log.error("could not start: %s %s", error.message, error.remedy)
            return EXIT_START_FAILED
        if stop.given:
            return 0
        self._shell.ready()
        try:
            await process.first_of(self._engine.failed(), stop.wait())
        except TandemError as error:
            log.error("the engine died: %s", error.message)
            self._shell.leave(error)
            # The streams that ran end by themselves now, with the engine's error.
            await process.first_of(self._shell.idle(), asyncio.sleep(1))
            return EXIT_ENGINE_DIED
        self._shell.leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.gather(*(membership.told() for membership in self._memberships))
        deadline_s = self._settings.drain_timeout_s
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await process.first_of(self._shell.idle(), stop.wait_impatient())
        return 0

    async def _load(self) -> None:
        info = await self._engine.start(self._progress)
        self._shell.start(info)
        self._progress("warming up")
        await self._shell.warm_up()

    def _progress(self, words: str) -> None:
        self._shell.progress = words
        log.info(words, extra={"worker_id": self._shell.worker_id})
