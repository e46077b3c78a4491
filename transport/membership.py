"""Keep a lease at a controller: register, renew, register again when it has forgotten.

Used by workers and by a controller that is registered at another one. It never blocks the event
loop, survives the controller's absence, and notices its restart at once through a tripwire.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from contextlib import suppress

import httpx
from pydantic import SecretStr, ValidationError

from protocol.messages import PROTOCOL_VERSION, Heartbeat, Lease, Registration, WorkerStatus
from transport import credentials, tripwire

log = logging.getLogger(__name__)

_RETRY_S = 0.5  # short: a restarted controller should have its workers back within 2 s


class Refused(Exception):
    """The controller answered and said no, or there is nothing to register with."""


class Membership:
    """One worker's lease at one controller; ``run`` it as a task until the process ends.

    ``status`` says what to report; ``None`` while there is nothing to offer yet.
    """

    def __init__(
        self,
        controller_address: str,
        worker_address: str,
        status: Callable[[], WorkerStatus | None],
        *,
        heartbeat_s: float | None = None,
        token: SecretStr | None = None,
    ) -> None:
        self._controller = controller_address.rstrip("/")
        self._worker_address = worker_address
        self._status = status
        self._heartbeat_s = heartbeat_s  # None: as the controller's lease says
        self._headers = credentials.headers(token)
        self._tls: ssl.SSLContext | None = None
        self._beat_now = asyncio.Event()
        self._told = asyncio.Event()  # the controller knows of the last change

    def beat_soon(self) -> None:
        """Send a heartbeat without waiting for its time: the status has changed."""
        self._told.clear()
        self._beat_now.set()

    async def told(self) -> None:
        """Return when the controller knows of the change ``beat_soon`` was called for."""
        await self._told.wait()

    async def run(self) -> None:
        """Register and renew until cancelled."""
        complaint = ""
        limits = httpx.Timeout(connect=2, read=10, write=5, pool=5)
        # The controller is this cluster's own: no proxy of the environment is asked.
        if self._controller.startswith("https:"):
            # Unlike httpx's own, it knows this machine's authorities and SSL_CERT_FILE.
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        client = httpx.AsyncClient(
            base_url=self._controller,
            headers=self._headers,
            timeout=limits,
            trust_env=False,
            verify=self._tls or True,
        )
        async with client:
            while True:
                try:
                    lease = await self._register(client)
                    log.info("registered", extra={"address": self._controller})
                    complaint = ""
                    await self._renew(client, lease)
                except (httpx.HTTPError, OSError, ValidationError, Refused) as exc:
                    sentence = str(exc) or type(exc).__name__
                    if sentence != complaint:  # one line a reason, not one a second
                        complaint = sentence
                        log.warning(
                            "not registered, trying again: %s",
                            sentence,
                            extra={"address": self._controller},
                        )
                await asyncio.sleep(_RETRY_S)

    async def _register(self, client: httpx.AsyncClient) -> Lease:
        registration = Registration(
            worker_name=self._worker_address,
            worker_status=self._report(),
            protocol_version=PROTOCOL_VERSION,
        )
        return await self._post(client, "/register_worker", registration)

    async def _beat(self, client: httpx.AsyncClient) -> Lease:
        status = self._report()
        heartbeat = Heartbeat(
            worker_name=self._worker_address,
            queue_length=status.queue_length,
            worker_status=status,
            protocol_version=PROTOCOL_VERSION,
        )
        return await self._post(client, "/receive_heart_beat", heartbeat)

    def _report(self) -> WorkerStatus:
        status = self._status()
        if status is None:
            raise Refused("there is no model to offer yet")
        return status

    async def _post(
        self, client: httpx.AsyncClient, path: str, message: Registration | Heartbeat
    ) -> Lease:
        response = await client.post(
            path, content=message.model_dump_json(), headers={"content-type": "application/json"}
        )
        if response.status_code != 200:
            raise Refused(_reason(response))
        # LLaVA's and FastChat's controllers answer a registration with nothing.
        return Lease.model_validate(response.json() or {"exist": True})

    async def _renew(self, client: httpx.AsyncClient, lease: Lease) -> None:
        """Heartbeats until the controller forgets us or goes away."""
        wire = asyncio.ensure_future(tripwire.closed(self._controller, tls=self._tls))
        try:
            while lease.exist:
                wake = asyncio.ensure_future(self._beat_now.wait())
                await asyncio.wait(
                    (wire, wake),
                    timeout=self._heartbeat_s or lease.heartbeat_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                wake.cancel()
                self._beat_now.clear()
                if wire.done():
                    wire.result()
                    return
                lease = await self._beat(client)
                if not self._beat_now.is_set():
                    self._told.set()
        finally:
            wire.cancel()


def _reason(response: httpx.Response) -> str:
    """Why the controller refused, in its own words where it has some."""
    with suppress(ValueError, KeyError, TypeError):
        error = response.json()["error"]
        return f"{error['message']} {error['remedy']}"
    return f"the controller answered {response.status_code}"
