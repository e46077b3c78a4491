"""Who is alive: replicas and their leases. Pure: no I/O, and the clock is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from protocol.messages import WorkerState, WorkerStatus


@dataclass(slots=True, eq=False)
class Replica:
    """One incarnation of a worker, as the controller routes to it.

    A worker that restarts (a newer ``status.epoch``) is another replica, so slots of the old one
    are given back to the old one and the counts of the new one never go wrong.
    """

    address: str
    status: WorkerStatus
    expires_at: float | None  # monotonic seconds; None: LLaVA's check_heart_beat was off
    renewed_at: float
    inflight: int = 0  # dispatched by this controller, not yet ended
    inflight_work: float = 0.0  # tokens, see policy.work_of

    @property
    def worker_id(self) -> str:
        return self.status.worker_id or self.address

    @property
    def ready(self) -> bool:
        return self.status.state is WorkerState.READY

    @property
    def has_room(self) -> bool:
        return self.status.capacity is None or self.inflight < self.status.capacity


@dataclass(frozen=True, slots=True)
class MembershipEvent:
    """Something that happened to a worker, for people who look at the cluster."""

    at: float  # monotonic seconds
    what: str  # "registered", "restarted", "ready", "draining", "lost", "expired"
    worker_id: str
    address: str
    reason: str = ""


class Registry:
    """The replicas by address.

    Every change calls ``on_change``; what people would want to read of, ``on_event`` before it.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        ttl_s: float,
        on_change: Callable[[], None],
        on_event: Callable[[MembershipEvent], None],
    ) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._on_change = on_change
        self._on_event = on_event
        self._replicas: dict[str, Replica] = {}
        self._known_models: dict[str, None] = {}  # ever served here, in order of appearance
        self._known_bases: set[str] = set()  # those of them that are no adapter's
        self.events: deque[MembershipEvent] = deque(maxlen=200)

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._replicas.values()))

    def __len__(self) -> int:
        return len(self._replicas)

    def get(self, address: str) -> Replica | None:
        return self._replicas.get(address)

    def by_worker_id(self, worker_id: str) -> Replica | None:
        return next((replica for replica in self if replica.worker_id == worker_id), None)

    def serving(self, model: str) -> list[Replica]:
        """The replicas of ``model``, whatever their state."""
        return [r for r in self._replicas.values() if model in r.status.model_names]

    def models(self) -> list[str]:
        """Models with a ready replica, in order of appearance."""
        ready = {name for r in self._replicas.values() if r.ready for name in r.status.model_names}
        return [name for name in self._known_models if name in ready]

    def knows(self, model: str) -> bool:
        """Whether ``model`` has ever been served here: its absence is then temporary.

        A base with an adapter is none: adapters are unloaded for good.
        """
        return model in self._known_bases

    def register(
        self, address: str, status: WorkerStatus, *, check_heart_beat: bool = True
    ) -> Replica:
        """Accept a worker, or a newer incarnation of it, or news of the one that is known."""
        known = self._replicas.get(address)
        now = self._clock()
        expires_at = now + self._ttl_s if check_heart_beat else None
        if known is not None and known.status.epoch == status.epoch:
            known.expires_at = expires_at
            return self._update(known, status)
        replica = Replica(address, status, expires_at, now)
        self._replicas[address] = replica
        self._note("registered" if known is None else "restarted", replica, status.state.value)
        self._learn(status)
        self._on_change()
        return replica

    def renew(self, address: str, status: WorkerStatus | None, queue_length: int) -> bool:
        """A heartbeat. False when the worker is unknown, or a newer incarnation of the known one,
        and has to register."""
        replica = self._replicas.get(address)
        if replica is None or (status is not None and status.epoch != replica.status.epoch):
            return False
        if replica.expires_at is not None:
            replica.expires_at = self._clock() + self._ttl_s
        if status is None:
            status = replica.status.model_copy(update={"queue_length": queue_length})
        self._update(replica, status)
        return True

    def remove(self, replica: Replica, what: str, reason: str) -> None:
        """Forget a replica, unless a newer incarnation has taken its place."""
        if self._replicas.get(replica.address) is replica:
            del self._replicas[replica.address]
            self._note(what, replica, reason)
            self._on_change()

    def expire(self) -> None:
        """Forget every replica whose lease has run out."""
        now = self._clock()
        for replica in self:
            if replica.expires_at is not None and replica.expires_at <= now:
                self.remove(replica, "expired", f"no heartbeat for {self._ttl_s:g} s")

    def _update(self, replica: Replica, status: WorkerStatus) -> Replica:
        changed = replica.status.state is not status.state
        replica.status = status
        replica.renewed_at = self._clock()
        if changed:
            self._note(status.state.value, replica)
        self._learn(status)
        self._on_change()
        return replica

    def _learn(self, status: WorkerStatus) -> None:
        self._known_models.update(dict.fromkeys(status.model_names))
        self._known_bases.update(status.bases)

    def _note(self, what: str, replica: Replica, reason: str = "") -> None:
        event = MembershipEvent(self._clock(), what, replica.worker_id, replica.address, reason)
        self.events.append(event)
        self._on_event(event)
