"""Admission and placement: a request gets a slot of a replica, or a typed reason why not.

Requests wait here and nowhere else, in arrival order, bounded by count, bytes and age.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from controller.policy import Policy, Random, work_of
from controller.registry import Registry, Replica
from protocol.errors import (
    AdapterNotFound,
    Draining,
    ModelNotFound,
    NoReplicaAvailable,
    Overloaded,
    TandemError,
    Unsupported,
)
from protocol.messages import GenerateRequest, WorkerState, one_adapter, split_model

_SERVICE_WEIGHT = 0.1  # of the newest request in the mean service time


@dataclass(frozen=True, slots=True)
class Demand:
    """What placement needs to know of a request."""

    model: str
    kind: str | None
    adapter: str | None
    needs: frozenset[str]
    work: float  # tokens
    body_bytes: int

    @classmethod
    def of(cls, request: GenerateRequest, body_bytes: int) -> Demand:
        return cls(
            model=request.model,
            kind=request.kind,
            adapter=request.adapter,
            needs=request.needs,
            work=work_of(request),
            body_bytes=body_bytes,
        )


@dataclass(slots=True, eq=False)
class _Waiter:
    demand: Demand
    excluded: frozenset[str]
    granted: asyncio.Future[Replica] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(frozen=True, slots=True)
class DispatchStatistics:
    waiting: int
    waiting_bytes: int
    inflight: int


class Dispatcher:
    """Hands out slots. ``wake`` is to be called whenever the registry has changed."""

    def __init__(
        self,
        registry: Registry,
        policy: Policy,
        *,
        random: Random,
        clock: Callable[[], float],
        max_waiting: int,
        max_waiting_bytes: int,
        max_wait_s: float,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._random = random
        self._clock = clock
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._max_wait_s = max_wait_s
        self._waiters: deque[_Waiter] = deque()
        self._waiting_bytes = 0
        self._inflight = 0
        self._service_s = 1.0  # mean time a slot is held
        self._closed = False

    @asynccontextmanager
    async def lease(
        self, demand: Demand, excluded: frozenset[str] = frozenset()
    ) -> AsyncIterator[Replica]:
        """Hold a slot of a replica whose address is not ``excluded``.

        Raises:
            ModelNotFound, AdapterNotFound, InvalidRequest, Unsupported: no replica will ever
                serve this.
            NoReplicaAvailable: none that could is ready.
            Overloaded: the waiting room is full, or the wait was too long.
            Draining: this controller is stopping.
        """
        replica = await self._acquire(demand, excluded)
        taken_at = self._clock()
        try:
            yield replica
        finally:
            self._release(replica, demand)
            self._service_s += _SERVICE_WEIGHT * (self._clock() - taken_at - self._service_s)

    def wake(self) -> None:
        """Place those who wait, first come first; refuse those who now wait in vain."""
        full: set[tuple[object, ...]] = set()  # demands found without room in this pass
        for waiter in list(self._waiters):
            key = _key(waiter.demand, waiter.excluded)
            if waiter.granted.done() or key in full:
                continue
            try:
                replica = self._choose(waiter.demand, waiter.excluded)
            except TandemError as error:
                waiter.granted.set_exception(error)
                continue
            if replica is None:
                full.add(key)
                continue
            self._take(replica, waiter.demand)
            waiter.granted.set_result(replica)

    def close(self) -> None:
        """Refuse those who wait and all who come; slots in use stay until given back."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.granted.done():
                waiter.granted.set_exception(_stopping())

    def place(self, demand: Demand) -> tuple[int, int] | None:
        """Which place the request of ``demand`` has among those that wait for its model (1: the
        next), and how many they are; ``None`` when it does not wait."""
        line = [w.demand for w in self._waiters if w.demand.model == demand.model]
        found = next((n for n, waiting in enumerate(line, 1) if waiting is demand), None)
        return None if found is None else (found, len(line))

    def statistics(self) -> DispatchStatistics:
        return DispatchStatistics(len(self._waiters), self._waiting_bytes, self._inflight)

    # ---- inside

    async def _acquire(self, demand: Demand, excluded: frozenset[str]) -> Replica:
        if self._closed:
            raise _stopping()
        replica = self._choose(demand, excluded)
        if replica is not None:  # ``wake`` leaves no room to those who wait, so none is ahead
            self._take(replica, demand)
            return replica
        self._check_room(demand)
        waiter = _Waiter(demand, excluded)
        self._waiters.append(waiter)
        self._waiting_bytes += demand.body_bytes
        try:
            async with asyncio.timeout(self._max_wait_s):
                return await waiter.granted
        except TimeoutError:
            self._give_back(waiter)
            raise Overloaded(
                f"No slot became free within {self._max_wait_s:g} s.",
                retry_after_s=self._retry_after_s(),
            ) from None
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise
        finally:
            self._waiters.remove(waiter)
            self._waiting_bytes -= demand.body_bytes

    def _give_back(self, waiter: _Waiter) -> None:
        """The slot may have been granted in the very turn in which the wait was given up."""
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self._release(granted.result(), waiter.demand)

    def _check_room(self, demand: Demand) -> None:
        """Raise ``Overloaded`` when the waiting room cannot take this request as well."""
        if len(self._waiters) >= self._max_waiting:
            sentence = f"{len(self._waiters)} requests wait already."
        elif self._waiting_bytes + demand.body_bytes > self._max_waiting_bytes:
            sentence = f"Requests of {self._waiting_bytes} bytes in all wait already."
        else:
            return
        raise Overloaded(sentence, retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        """When those who wait now should all have been served."""
        slots = sum(r.status.capacity or 1 for r in self._registry if r.ready)
        return max(1.0, len(self._waiters) * self._service_s / max(slots, 1))

    def _choose(self, demand: Demand, excluded: frozenset[str]) -> Replica | None:
        """A replica with room, ``None`` when all are full; raises when waiting is in vain."""
        replicas = [r for r in eligible(self._registry, demand) if r.address not in excluded]
        if not replicas:
            raise NoReplicaAvailable(
                f"Every replica of {demand.model!r} has failed this request.", retry_after_s=5
            )
        with_room = [replica for replica in replicas if replica.has_room]
        return self._policy(with_room, self._random) if with_room else None

    def _take(self, replica: Replica, demand: Demand) -> None:
        replica.inflight += 1
        replica.inflight_work += demand.work
        self._inflight += 1

    def _release(self, replica: Replica, demand: Demand) -> None:
        replica.inflight -= 1
        replica.inflight_work = replica.inflight_work - demand.work if replica.inflight else 0.0
        self._inflight -= 1
        if self._waiters:
            self.wake()


def _key(demand: Demand, excluded: frozenset[str]) -> tuple[object, ...]:
    """Demands with the same key can be served by the same replicas."""
    return (demand.model, demand.kind, demand.adapter, demand.needs, excluded)


def _stopping() -> Draining:
    return Draining("This controller is stopping.", retry_after_s=5)


def eligible(registry: Registry, demand: Demand) -> Sequence[Replica]:
    """The ready replicas that can serve ``demand``, at least one.

    Raises:
        ModelNotFound, AdapterNotFound, InvalidRequest, Unsupported, NoReplicaAvailable: as
            ``lease`` says.
    """
    model, adapter = _asked_for(registry, demand)
    replicas = registry.serving(model)
    if not replicas:
        raise _absent(registry, model)
    if demand.kind is not None:
        replicas = _of_kind(replicas, demand.kind)
    if adapter is not None:
        replicas = _adapted(replicas, model, adapter)
    ready = [replica for replica in replicas if replica.ready]
    if not ready:
        raise _not_ready(replicas, demand.model)
    capable = [r for r in ready if not r.status.capabilities.missing(demand.needs)]
    if not capable:
        missing = ready[0].status.capabilities.missing(demand.needs)
        kinds = ", ".join(sorted({replica.status.kind for replica in ready}))
        raise Unsupported(
            f"No ready replica of {demand.model!r} supports {' and '.join(missing)}; "
            f"there is only {kinds}."
        )
    return capable


def _asked_for(registry: Registry, demand: Demand) -> tuple[str, str | None]:
    """The model and the adapter of ``demand``, in either spelling.

    A colon in a name that is a model's own is no adapter's.
    """
    base, named = split_model(demand.model)
    if named is None or registry.knows(demand.model) or not registry.knows(base):
        return demand.model, demand.adapter
    return base, one_adapter(named, demand.adapter)


def _adapted(replicas: list[Replica], model: str, adapter: str) -> list[Replica]:
    """Those of ``replicas`` that have ``adapter``; all, while none of them is ready to tell."""
    chosen = [r for r in replicas if f"{model}:{adapter}" in r.status.model_names]
    if not chosen and any(replica.ready for replica in replicas):
        raise AdapterNotFound(f"No worker has the adapter {adapter!r} loaded for {model!r}.")
    return chosen or replicas


def _absent(registry: Registry, model: str) -> TandemError:
    if registry.knows(model):
        return NoReplicaAvailable(
            f"No worker serves {model!r} at present; one did earlier.", retry_after_s=5
        )
    served = ", ".join(registry.models()) or "none yet"
    return ModelNotFound(f"Unknown model {model!r}; served are: {served}.")


def _of_kind(replicas: Sequence[Replica], kind: str) -> list[Replica]:
    chosen = [replica for replica in replicas if replica.status.kind == kind]
    if not chosen:
        kinds = ", ".join(sorted({replica.status.kind for replica in replicas}))
        raise NoReplicaAvailable(
            f"No {kind} worker serves this model; there is only {kinds}.", retry_after_s=5
        )
    return chosen


def _not_ready(replicas: Sequence[Replica], model: str) -> NoReplicaAvailable:
    states = {replica.status.state for replica in replicas}
    doing = "loading" if WorkerState.STARTING in states else "draining"
    return NoReplicaAvailable(f"Every replica of {model!r} is {doing}.", retry_after_s=5)
