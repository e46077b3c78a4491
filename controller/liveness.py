"""Keep the registry true: dial workers back, renew leases, notice deaths at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

import httpx
from pydantic import ValidationError

from controller import foreign
from controller.registry import Registry, Replica
from protocol.errors import InvalidRequest, TandemError, Unsupported, UpstreamLost
from protocol.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    Lease,
    Registration,
    WorkerState,
    WorkerStatus,
)
from transport import tripwire
from transport.addresses import bare, check_address
from transport.client import Unreachable
from transport.credentials import TOKEN_VARIABLE

_LISTENS_S = 0.5  # between two looks whether a worker that registered listens; its lease ends it
_REWATCH_S = 1.0  # pause before a tripwire is stretched again to a worker that is well


class Liveness:
    """The registry's hands: everything about membership that needs a network or a clock."""

    def __init__(
        self, registry: Registry, *, ttl_s: float, heartbeat_s: float, headers: Mapping[str, str]
    ) -> None:
        """``headers`` go with everything that is sent to workers."""
        self._registry = registry
        self._ttl_s = ttl_s
        self._heartbeat_s = heartbeat_s
        # Workers are this cluster's own: the environment's proxies are for the world outside.
        limits = httpx.Timeout(connect=2, read=5, write=5, pool=5)
        self._client = httpx.AsyncClient(timeout=limits, trust_env=False, headers=headers)
        self._watches: dict[Replica, asyncio.Task[None]] = {}
        self._probes: set[asyncio.Task[bool]] = set()

    # ---- what workers say

    async def register(self, registration: Registration) -> Lease:
        """Accept a worker, once it has answered at the address it gave.

        Raises:
            InvalidRequest: the address is malformed, cannot be reached, or is another worker's.
        """
        address = _address(registration.worker_name)
        status = await self._dial(address, registration.worker_status)
        status = foreign.described(status, registration)
        self._registry.register(address, status, check_heart_beat=registration.check_heart_beat)
        return self._lease(exist=True)

    async def renew(self, heartbeat: Heartbeat) -> Lease:
        """A heartbeat; one with a full status also registers, so a restarted controller is whole
        after one beat (law L5). Raises as ``register`` does."""
        address = _address(heartbeat.worker_name)
        status = heartbeat.worker_status
        exist = self._registry.renew(address, status, heartbeat.queue_length)
        if not exist and status is not None:
            return await self.register(
                Registration(worker_name=address, worker_status=status, check_heart_beat=True)
            )
        return self._lease(exist=exist)

    # ---- what we find out

    def suspect(self, replica: Replica, error: TandemError) -> None:
        """A stream to this replica has broken: find out whether the worker still lives."""
        if isinstance(error, Unreachable):
            self._registry.remove(replica, "lost", error.message)
        elif isinstance(error, UpstreamLost):
            task = asyncio.create_task(self._probe(replica))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def refresh(self) -> None:
        """Ask every worker for its status now; those that do not answer are forgotten."""
        await asyncio.gather(*(self._probe(replica) for replica in self._registry))

    async def command(self, replica: Replica, command: str) -> WorkerStatus:
        """Tell a worker to ``drain`` or ``resume``; returns its status afterwards.

        Raises:
            UpstreamLost: it does not answer.
            Unsupported: it is a worker (LLaVA's, say) that knows no such command.
        """
        try:
            response = await self._client.post(f"{replica.address}/{command}")
        except httpx.HTTPError as exc:
            raise UpstreamLost(f"{replica.worker_id} does not answer: {_reason(exc)}.") from exc
        if response.status_code != 200:
            raise Unsupported(f"{replica.worker_id} cannot {command}.", remedy="Stop it instead.")
        status = WorkerStatus.model_validate_json(response.content)
        self._registry.renew(replica.address, status, status.queue_length)
        return status

    def rewatch(self) -> None:
        """Have exactly one tripwire to each replica; called when the registry has changed."""
        current = set(self._registry)
        for replica in [replica for replica in self._watches if replica not in current]:
            self._watches.pop(replica).cancel()
        for replica in current - self._watches.keys():
            self._watches[replica] = asyncio.create_task(self._watch(replica))

    async def run(self) -> None:
        """Let leases expire, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._ttl_s / 4))
            self._registry.expire()

    async def aclose(self) -> None:
        tasks = [*self._watches.values(), *self._probes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    # ---- inside

    def _lease(self, *, exist: bool) -> Lease:
        return Lease(
            exist=exist,
            ttl_s=self._ttl_s,
            heartbeat_s=self._heartbeat_s,
            protocol_version=PROTOCOL_VERSION,
        )

    async def _dial(self, address: str, claimed: WorkerStatus | None) -> WorkerStatus:
        remedy = "Give the worker a --worker-address that this controller can reach."
        try:
            status = await self._status(address)
        except httpx.HTTPError as exc:
            if claimed is not None and foreign.is_foreign(claimed):
                return foreign.not_yet_listening(claimed)
            raise InvalidRequest(
                f"No worker can be reached at {address}: {_reason(exc)}.", remedy=remedy
            ) from exc
        except ValidationError as exc:
            raise InvalidRequest(f"What answers at {address} is no worker.", remedy=remedy) from exc
        if claimed is not None and claimed.epoch != status.epoch:
            raise InvalidRequest(
                f"At {address} answers {status.worker_id or 'another worker'}, "
                f"not {claimed.worker_id or 'the one that registers'}.",
                remedy=remedy,
            )
        return status

    async def _status(self, address: str) -> WorkerStatus:
        response = await self._client.post(f"{address}/worker_get_status")
        response.raise_for_status()
        return WorkerStatus.model_validate_json(response.content)

    async def _probe(self, replica: Replica) -> bool:
        """Ask for its status; forget it when it does not answer."""
        try:
            status = await self._status(replica.address)
        except (httpx.HTTPError, ValidationError) as exc:
            self._forget(replica, _reason(exc))
            return False
        self._learn(replica, status)
        return True

    def _learn(self, replica: Replica, status: WorkerStatus) -> None:
        status = foreign.as_known(status, replica.status)
        if status.epoch == replica.status.epoch:
            self._registry.renew(replica.address, status, status.queue_length)
        else:
            self._registry.register(replica.address, status)

    async def _watch(self, replica: Replica) -> None:
        while not replica.ready and foreign.is_foreign(replica.status):
            await asyncio.sleep(_LISTENS_S)
            with suppress(httpx.HTTPError, ValidationError):
                self._learn(replica, await self._status(replica.address))
        while True:
            try:
                await tripwire.closed(replica.address)
            except OSError as exc:
                self._forget(replica, _reason(exc))
                return
            if not await self._probe(replica):
                return
            await asyncio.sleep(_REWATCH_S)

    def _forget(self, replica: Replica, reason: str) -> None:
        what = "left" if replica.status.state is WorkerState.DRAINING else "lost"
        self._registry.remove(replica, what, reason)


def _address(worker_name: str) -> str:
    try:
        # A password in it is for controllers of other makes; ours has the cluster's token.
        return bare(check_address(worker_name, password=True))
    except ValueError as exc:
        raise InvalidRequest(f"worker_name: {exc}.") from exc


def _reason(exc: Exception) -> str:
    """What has gone wrong with a connection, in words; httpx's own are none."""
    if isinstance(exc, httpx.TimeoutException | TimeoutError):
        return "it does not answer in time"
    if isinstance(exc, httpx.ConnectError | ConnectionRefusedError):
        return "no connection can be made"
    if isinstance(exc, httpx.TransportError | OSError):
        return "the connection broke"
    if isinstance(exc, httpx.HTTPStatusError):
        if exc.response.status_code == 401:
            return f"it answers 401, so its {TOKEN_VARIABLE} is not that of this controller"
        return f"it answers {exc.response.status_code}"
    return "its answer cannot be read"
