"""Leases, incarnations and what is remembered of the dead."""

from __future__ import annotations

from controller.registry import Registry
from protocol.messages import WorkerState
from tests.unit.fakes import Clock, status

A, B = "http://a:1", "http://b:1"


class Watched(Registry):
    def __init__(self, ttl_s: float = 90) -> None:
        self.clock = Clock()
        self.changes = 0
        super().__init__(
            clock=self.clock, ttl_s=ttl_s, on_change=self._count, on_event=lambda _: None
        )

    def _count(self) -> None:
        self.changes += 1


def whats(registry: Registry) -> list[str]:
    return [event.what for event in registry.events]


def test_a_lease_runs_out_exactly_then() -> None:
    registry = Watched(ttl_s=90)
    registry.register(A, status())
    registry.clock.now += 89.9
    registry.expire()
    assert len(registry) == 1
    registry.clock.now += 0.1
    registry.expire()
    assert len(registry) == 0
    assert whats(registry) == ["registered", "expired"]


def test_a_heartbeat_renews_it() -> None:
    registry = Watched(ttl_s=90)
    registry.register(A, status())
    for _ in range(5):
        registry.clock.now += 80
        assert registry.renew(A, status(running=1), 1)
        registry.expire()
    replica = registry.get(A)
    assert replica is not None
    assert replica.status.running == 1


def test_a_heartbeat_of_an_unknown_worker_is_not_known() -> None:
    assert not Watched().renew(A, None, 0)


def test_llavas_heartbeat_updates_the_queue_only() -> None:
    registry = Watched()
    registry.register(A, status())
    assert registry.renew(A, None, 7)
    replica = registry.get(A)
    assert replica is not None
    assert replica.status == status(queue_length=7)


def test_a_worker_without_heartbeats_never_expires() -> None:
    registry = Watched()
    registry.register(A, status(), check_heart_beat=False)
    registry.clock.now += 1e9
    registry.expire()
    assert len(registry) == 1


def test_a_restarted_worker_is_another_replica() -> None:
    registry = Watched()
    old = registry.register(A, status(epoch=1))
    old.inflight = 3
    assert not registry.renew(A, status(epoch=2), 0), "it has to register"
    new = registry.register(A, status(epoch=2))
    assert new is not old
    assert new.inflight == 0
    old.inflight -= 3  # the leases of the old one end
    assert new.inflight == 0
    registry.remove(old, "lost", "")
    assert registry.get(A) is new, "the old one's end is not the new one's"


def test_registering_twice_is_news_of_the_same() -> None:
    registry = Watched()
    first = registry.register(A, status())
    first.inflight = 1
    assert registry.register(A, status(running=1)) is first
    assert first.inflight == 1


def test_models_are_those_of_ready_replicas_in_order_of_appearance() -> None:
    registry = Watched()
    registry.register(A, status(model_names=("x", "y")))
    registry.register(B, status(model_names=("z",), state=WorkerState.STARTING))
    assert registry.models() == ["x", "y"]
    registry.renew(B, status(model_names=("z",)), 0)
    assert registry.models() == ["x", "y", "z"]


def test_a_model_that_was_served_stays_known() -> None:
    registry = Watched()
    replica = registry.register(A, status(model_names=("x",)))
    registry.remove(replica, "lost", "")
    assert registry.models() == []
    assert registry.knows("x")
    assert not registry.knows("y")


def test_an_adapter_is_not_known_for_ever() -> None:
    registry = Watched()
    registry.register(A, status(adapters=("formal",)))
    assert registry.models() == ["m", "m:formal"]
    assert registry.knows("m")
    assert not registry.knows("m:formal")


def test_every_change_is_told() -> None:
    registry = Watched()
    replica = registry.register(A, status())
    registry.renew(A, status(state=WorkerState.DRAINING), 0)
    registry.remove(replica, "left", "")
    assert registry.changes == 3
    assert whats(registry) == ["registered", "draining", "left"]


def test_room() -> None:
    registry = Watched()
    replica = registry.register(A, status(capacity=2))
    replica.inflight = 1
    assert replica.has_room
    replica.inflight = 2
    assert not replica.has_room
    unlimited = registry.register(B, status(capacity=None))
    unlimited.inflight = 10**6
    assert unlimited.has_room
