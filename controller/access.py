"""What stands before the controller's routes, made from its settings."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from controller import keys
from controller.accounts import Accounts
from controller.callers import KeyRing
from controller.gate import Gate
from controller.settings import ControllerSettings
from transport.exits import usage_error

log = logging.getLogger(__name__)


async def prepare(settings: ControllerSettings, resolve: Callable[[str], str]) -> KeyRing | None:
    """The holders of keys, ``None`` where clients need none.

    ``resolve`` tells the model that a name stands for: keys may name aliases.

    Key or certificate files that cannot be used end the process with a sentence and exit code 2.
    """
    if settings.tls is not None:
        try:
            await asyncio.to_thread(settings.tls.check)
        except ValueError as exc:
            usage_error(str(exc))
    path = settings.api_key_file
    if path is None:
        if not settings.local:
            log.warning("clients need no key; --api-key-file asks them for one")
        return None
    try:
        file = await asyncio.to_thread(keys.load, path)
    except keys.KeyFileError as exc:
        usage_error(f"--api-key-file: {exc}")
    ring = KeyRing(file, time.monotonic, resolve)
    if (complaint := await asyncio.to_thread(keys.exposed, path)) is not None:
        log.warning("%s", complaint)
    if not len(ring):
        log.warning("%s holds no key: every client is refused", path)
    return ring


def guarded(
    app: ASGIApp, settings: ControllerSettings, ring: KeyRing | None, accounts: Accounts
) -> ASGIApp:
    """``app`` behind the gate, and open to the pages of the origins that are named."""
    gate = Gate(
        app,
        keys=ring,
        token=settings.cluster_token,
        origins=settings.cors_origins,
        local=settings.local,
        accounts=accounts,
    )
    if not settings.cors_origins:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's clients send a dozen of their own
        expose_headers=["X-Request-Id", "X-Tandem-Worker", "X-Tandem-Kind", "Retry-After"],
        max_age=600,
    )
