"""Admission and placement: typed refusals, arrival order, and never a slot lost."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from controller.dispatch import Demand, Dispatcher
from controller.policy import shortest_queue
from controller.registry import Registry, Replica
from protocol.errors import (
    AdapterNotFound,
    Draining,
    InvalidRequest,
    ModelNotFound,
    NoReplicaAvailable,
    Overloaded,
    TandemError,
    Unsupported,
)
from protocol.messages import Capabilities, WorkerState
from tests.unit.fakes import Clock, status

ADAPTERS = Capabilities(adapters=True)
DEMAND = Demand("m", None, None, frozenset(), work=10.0, body_bytes=100)


class Desk:
    """A dispatcher over a registry, joined as the controller joins them."""

    def __init__(self, **limits: Any) -> None:
        self.clock = Clock()
        self.registry = Registry(
            clock=self.clock,
            ttl_s=90,
            on_change=lambda: self.dispatcher.wake(),
            on_event=lambda _: None,
        )
        defaults: dict[str, Any] = {
            "max_waiting": 100,
            "max_waiting_bytes": 10**6,
            "max_wait_s": 10.0,
        }
        self.dispatcher = Dispatcher(
            self.registry,
            shortest_queue,
            random=Random(1),
            clock=self.clock,
            **defaults | limits,
        )

    def add(self, address: str = "http://a:1", **fields: Any) -> Replica:
        return self.registry.register(address, status(worker_id=address, **fields))

    async def hold(self, demand: Demand = DEMAND, release: asyncio.Event | None = None) -> Replica:
        async with self.dispatcher.lease(demand) as replica:
            if release is not None:
                await release.wait()
            return replica


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(
    desk: Desk, demand: Demand = DEMAND, excluded: frozenset[str] = frozenset()
) -> TandemError:
    with pytest.raises(TandemError) as caught:
        async with desk.dispatcher.lease(demand, excluded):
            pass
    return caught.value


async def test_an_unknown_model() -> None:
    desk = Desk()
    desk.add(model_names=("x", "y"))
    error = await refusal(desk)
    assert type(error) is ModelNotFound
    assert "x, y" in error.message


async def test_a_model_whose_worker_is_gone() -> None:
    desk = Desk()
    desk.registry.remove(desk.add(), "lost", "")
    error = await refusal(desk)
    assert type(error) is NoReplicaAvailable
    assert error.retry_after_s


@pytest.mark.parametrize(
    ("state", "word"), [(WorkerState.STARTING, "loading"), (WorkerState.DRAINING, "draining")]
)
async def test_a_replica_that_is_not_ready(state: WorkerState, word: str) -> None:
    desk = Desk()
    desk.add(state=state)
    error = await refusal(desk)
    assert type(error) is NoReplicaAvailable
    assert word in error.message


async def test_another_kind() -> None:
    desk = Desk()
    desk.add(kind="hf")
    error = await refusal(desk, replace(DEMAND, kind="sglang"))
    assert type(error) is NoReplicaAvailable
    assert "only hf" in error.message


async def test_an_unknown_adapter_is_never_the_base_model() -> None:
    desk = Desk()
    replica = desk.add(adapters=("formal",), capabilities=ADAPTERS)
    assert type(await refusal(desk, replace(DEMAND, adapter="terse"))) is AdapterNotFound
    assert await desk.hold(replace(DEMAND, adapter="formal")) is replica


@pytest.mark.parametrize(
    ("model", "adapter"), [("m:formal", None), ("m", "formal"), ("m:formal", "formal")]
)
async def test_an_adapter_goes_to_who_has_it(model: str, adapter: str | None) -> None:
    desk = Desk()
    desk.add("http://a:1", adapters=("terse",), capabilities=ADAPTERS)
    able = desk.add("http://b:1", adapters=("terse", "formal"), capabilities=ADAPTERS)
    for _ in range(5):
        assert await desk.hold(replace(DEMAND, model=model, adapter=adapter)) is able


@pytest.mark.parametrize(
    ("model", "adapter", "expected"),
    [
        ("m:nobody", None, AdapterNotFound),
        ("m", "nobody", AdapterNotFound),
        ("m:", None, AdapterNotFound),
        ("m:formal:x", None, ModelNotFound),
        ("n:formal", None, ModelNotFound),
        ("m:formal", "terse", InvalidRequest),
    ],
)
async def test_adapters_that_cannot_be_had(
    model: str, adapter: str | None, expected: type[TandemError]
) -> None:
    desk = Desk()
    desk.add(adapters=("terse", "formal"), capabilities=ADAPTERS)
    assert type(await refusal(desk, replace(DEMAND, model=model, adapter=adapter))) is expected


async def test_a_models_own_name_may_contain_a_colon() -> None:
    desk = Desk()
    desk.add("http://a:1", model_names=("m",))
    other = desk.add("http://b:1", model_names=("m:7b", "m:7b:x"), adapters=("x",))
    assert await desk.hold(replace(DEMAND, model="m:7b")) is other
    assert await desk.hold(replace(DEMAND, model="m:7b:x")) is other
    error = await refusal(desk, replace(DEMAND, model="m:7b", adapter="y"))
    assert type(error) is AdapterNotFound
    desk.registry.remove(other, "lost", "")
    assert type(await refusal(desk, replace(DEMAND, model="m:7b"))) is NoReplicaAvailable


async def test_an_adapter_that_was_unloaded() -> None:
    desk = Desk()
    replica = desk.add(adapters=("formal",), capabilities=ADAPTERS)
    asked = replace(DEMAND, model="m:formal")
    assert await desk.hold(asked) is replica
    desk.add()
    assert type(await refusal(desk, asked)) is AdapterNotFound
    assert desk.registry.models() == ["m"]
    desk.registry.remove(replica, "lost", "")
    assert type(await refusal(desk, asked)) is NoReplicaAvailable


async def test_who_waits_for_an_adapter_hears_of_its_end() -> None:
    desk = Desk()
    desk.add(adapters=("formal",), capabilities=ADAPTERS, capacity=1)
    release = asyncio.Event()
    first = asyncio.create_task(desk.hold(release=release))
    await settle()
    second = asyncio.create_task(desk.hold(replace(DEMAND, model="m:formal")))
    await settle()
    desk.add(capacity=1)
    with pytest.raises(AdapterNotFound):
        await second
    release.set()
    await first


async def test_a_worker_that_loads_may_yet_bring_the_adapter() -> None:
    desk = Desk()
    desk.add(state=WorkerState.STARTING)
    error = await refusal(desk, replace(DEMAND, model="m:formal"))
    assert type(error) is NoReplicaAvailable
    assert "loading" in error.message


async def test_a_need_goes_to_the_kind_that_can() -> None:
    desk = Desk()
    desk.add("http://a:1", kind="sglang")
    seeded = replace(DEMAND, needs=frozenset({"seed"}))
    error = await refusal(desk, seeded)
    assert type(error) is Unsupported
    assert "seed" in error.message
    able = desk.add("http://b:1", kind="hf", capabilities=Capabilities(seed=True))
    for _ in range(5):
        assert await desk.hold(seeded) is able


async def test_the_excluded_are_not_asked_again() -> None:
    desk = Desk()
    a, b = desk.add("http://a:1"), desk.add("http://b:1")
    async with desk.dispatcher.lease(DEMAND, frozenset({a.address})) as replica:
        assert replica is b
    both = frozenset({a.address, b.address})
    assert type(await refusal(desk, DEMAND, both)) is NoReplicaAvailable


async def test_counts_rise_at_dispatch_and_fall_at_the_end() -> None:
    desk = Desk()
    replica = desk.add()
    async with desk.dispatcher.lease(DEMAND):
        assert (replica.inflight, replica.inflight_work) == (1, 10.0)
        assert desk.dispatcher.statistics().inflight == 1
    assert (replica.inflight, replica.inflight_work) == (0, 0.0)


async def test_a_slot_returns_when_the_holder_fails() -> None:
    desk = Desk()
    replica = desk.add()
    with pytest.raises(ValueError, match="mine"):
        async with desk.dispatcher.lease(DEMAND):
            raise ValueError("mine")
    assert replica.inflight == 0


async def test_they_wait_in_arrival_order() -> None:
    desk = Desk()
    desk.add(capacity=1)
    order: list[int] = []
    release = asyncio.Event()
    first = asyncio.create_task(desk.hold(release=release))
    await settle()

    async def come(number: int) -> None:
        async with desk.dispatcher.lease(DEMAND):
            order.append(number)

    later = [asyncio.create_task(come(number)) for number in range(20)]
    await settle()
    assert desk.dispatcher.statistics().waiting == 20
    release.set()
    await asyncio.gather(first, *later)
    assert order == list(range(20))


async def test_who_waits_for_one_model_does_not_hold_up_another() -> None:
    desk = Desk()
    desk.add("http://a:1", capacity=1, model_names=("m",))
    desk.add("http://b:1", capacity=1, model_names=("n",))
    release = asyncio.Event()
    tasks = [asyncio.create_task(desk.hold(release=release)) for _ in range(3)]
    await settle()
    assert (await desk.hold(replace(DEMAND, model="n"))).address == "http://b:1"
    release.set()
    await asyncio.gather(*tasks)


async def test_a_new_worker_takes_those_who_wait() -> None:
    desk = Desk()
    desk.add("http://a:1", capacity=1)
    release = asyncio.Event()
    first = asyncio.create_task(desk.hold(release=release))
    await settle()
    second = asyncio.create_task(desk.hold())
    await settle()
    new = desk.add("http://b:1")
    assert await second is new
    release.set()
    await first


async def test_the_last_replicas_death_is_told_to_those_who_wait() -> None:
    desk = Desk()
    replica = desk.add(capacity=1)
    release = asyncio.Event()
    first = asyncio.create_task(desk.hold(release=release))
    await settle()
    second = asyncio.create_task(desk.hold())
    await settle()
    desk.registry.remove(replica, "lost", "")
    with pytest.raises(NoReplicaAvailable):
        await second
    release.set()
    await first
    assert replica.inflight == 0


@pytest.mark.parametrize("limits", [{"max_waiting": 2}, {"max_waiting_bytes": 250}])
async def test_the_waiting_room_is_bounded(limits: dict[str, int]) -> None:
    desk = Desk(**limits)
    desk.add(capacity=1)
    release = asyncio.Event()
    tasks = [asyncio.create_task(desk.hold(release=release)) for _ in range(3)]
    await settle()
    error = await refusal(desk)
    assert type(error) is Overloaded
    assert error.retry_after_s
    release.set()
    await asyncio.gather(*tasks)


async def test_nobody_waits_too_long() -> None:
    desk = Desk(max_wait_s=0.01)
    desk.add(capacity=1)
    release = asyncio.Event()
    first = asyncio.create_task(desk.hold(release=release))
    await settle()
    assert type(await refusal(desk)) is Overloaded
    assert desk.dispatcher.statistics().waiting == 0
    release.set()
    await first


async def test_a_stopping_controller_refuses() -> None:
    desk = Desk()
    desk.add(capacity=1)
    release = asyncio.Event()
    running = asyncio.create_task(desk.hold(release=release))
    await settle()
    waiting = asyncio.create_task(desk.hold())
    await settle()
    desk.dispatcher.close()
    with pytest.raises(Draining):
        await waiting
    assert type(await refusal(desk)) is Draining
    release.set()
    await running


async def test_a_slot_granted_to_one_who_leaves_in_that_turn_is_not_lost() -> None:
    desk = Desk()
    replica = desk.add(capacity=1)
    first = desk.dispatcher.lease(DEMAND)
    await first.__aenter__()
    second = asyncio.create_task(desk.hold())
    await settle()
    await first.__aexit__(None, None, None)  # grants the slot to the second, still asleep
    assert replica.inflight == 1
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert replica.inflight == 0
    assert await desk.hold() is replica


@pytest.mark.parametrize("seed", range(20))
async def test_a_storm_leaves_nothing_behind(seed: int) -> None:
    """300 requests, 120 of which leave at random moments, while workers come and go."""
    random = Random(seed)
    desk = Desk(max_waiting=60)
    replicas = [desk.add(f"http://a:{n}", capacity=n + 1) for n in range(3)]
    seen: set[Replica] = set(replicas)

    async def one() -> None:
        with suppress(TandemError):
            async with desk.dispatcher.lease(DEMAND) as replica:
                seen.add(replica)
                assert replica.status.capacity is not None
                assert 0 < replica.inflight <= replica.status.capacity
                for _ in range(random.randrange(4)):
                    await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    for number in range(300):
        tasks.append(asyncio.create_task(one()))
        if random.random() < 0.4:
            random.choice(tasks).cancel()
        if number % 50 == 49:
            victim = random.choice(replicas)
            desk.registry.remove(victim, "lost", "")
            desk.add(victim.address, capacity=2, epoch=number)
        if random.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        assert task.cancelled() or task.exception() is None
    assert all(replica.inflight == 0 and replica.inflight_work == 0 for replica in seen)
    assert desk.dispatcher.statistics().waiting == 0
    assert desk.dispatcher.statistics().waiting_bytes == 0
    assert desk.dispatcher.statistics().inflight == 0
