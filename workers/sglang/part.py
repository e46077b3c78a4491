"""The life of a machine that serves a part of a model whose worker is on another one."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import NoReturn

from protocol.errors import TandemError
from transport import process
from transport.exits import EXIT_ENGINE_DIED, EXIT_START_FAILED
from workers.sglang.engine import SglangEngine
from workers.sglang.settings import SglangSettings

log = logging.getLogger(__name__)


def run_part(settings: SglangSettings, engine: SglangEngine) -> NoReturn:
    """Run ``engine``'s server until it ends or SIGTERM or Ctrl-C comes; exits the process.

    It neither listens nor registers: requests come to machine 0. What is asked to stop waits for
    machine 0 to end first, which ends this one's server, but no longer than the drain time.
    """
    process.run(lambda stop: _run(settings, engine, stop))


async def _run(settings: SglangSettings, engine: SglangEngine, stop: process.StopSignal) -> int:
    where = f"machine {settings.node_rank} of {settings.nnodes}"
    try:
        try:
            await process.first_of(engine.start_part(log.info), stop.wait())
        except TandemError as error:
            log.error("could not start: %s %s", error.message, error.remedy)
            return EXIT_START_FAILED
        if stop.given:
            return 0
        log.info("serving as %s", where)
        try:
            await process.first_of(engine.part_ended(), stop.wait())
        except TandemError as error:
            log.error("%s has ended: %s", where, error.message)
            return EXIT_ENGINE_DIED
        log.info("waiting for machine 0 to end")
        with suppress(TandemError):
            await process.first_of(
                engine.part_ended(),
                asyncio.sleep(settings.drain_timeout_s),
                stop.wait_impatient(),
            )
        return 0
    finally:
        await engine.aclose()
