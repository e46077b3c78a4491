"""The watch over a server: what it takes for death, for a hang, and for patience."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from protocol.errors import DeadlineExceeded, EngineFailed, UpstreamLost
from workers.sglang import watch
from workers.sglang.figures import Load
from workers.sglang.watch import Watch

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.005)


class FakeClient:
    """A server by what it answers; ``step`` moves its schedulers on."""

    base_url = "http://fake:1"

    def __init__(self) -> None:
        self.now = Load((0.0,), running=0, waiting=0, held_tokens=0, decoded_tokens=0, busy_s=0)
        self.error: Exception | None = None
        self.awaited_s = 0.0
        self.makes = True
        self.asked = 0
        self.was_cut = False

    def step(self, **fields: Any) -> None:
        known = {name: getattr(self.now, name) for name in Load.__slots__}
        self.now = Load(**known | {"steps": (self.now.steps[0] + 1,)} | fields)

    async def load(self) -> Load:
        if self.error is not None:
            raise self.error
        return self.now

    async def makes_a_token(self) -> bool:
        self.asked += 1
        return self.makes

    def cut(self) -> None:
        self.was_cut = True


class FakeProcess:
    def __init__(self) -> None:
        self.dead = asyncio.Event()

    async def wait(self) -> None:
        await self.dead.wait()

    def failure(self) -> EngineFailed:
        return EngineFailed("dead")


@asynccontextmanager
async def watching(
    client: Any,
    process: Any = None,
    *,
    hang_timeout_s: float = 30.0,
    health_interval_s: float = 30.0,
) -> AsyncIterator[Watch]:
    made = Watch(
        client, process, hang_timeout_s=hang_timeout_s, health_interval_s=health_interval_s
    )
    await made.look()
    made.start()
    try:
        yield made
    finally:
        await made.aclose()


async def test_the_death_of_the_process_is_the_failure() -> None:
    client, process = FakeClient(), FakeProcess()
    async with watching(client, process) as watched:
        process.dead.set()
        with pytest.raises(EngineFailed, match="dead"):
            await watched.failed()
    assert client.was_cut, "answers of what lives on of it would never end"


async def test_who_loses_a_connection_hears_why() -> None:
    process = FakeProcess()
    async with watching(FakeClient(), process) as watched:
        process.dead.set()
        assert (await watched.reason(UpstreamLost("cut"))).message == "dead"


async def test_a_scheduler_that_takes_no_step_hangs() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess(), hang_timeout_s=0.1) as watched:
        client.awaited_s = 99.0
        with watched.request(), pytest.raises(EngineFailed, match=r"nothing for 0\.1 s"):
            await watched.failed()


async def test_steps_are_signs_of_life() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess(), hang_timeout_s=0.2) as watched:
        client.awaited_s = 99.0
        with watched.request():
            for _ in range(40):  # a long prompt: no token, but chunk by chunk is computed
                client.step()
                await asyncio.sleep(0.01)  # sleep: steps take a while
            assert not watched._failure.done()


async def test_a_slow_reader_is_not_a_slow_server() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess(), hang_timeout_s=0.05) as watched:
        with watched.request():  # nobody awaits a piece of its answer
            await asyncio.sleep(0.2)  # sleep: longer than the hang time
            assert not watched._failure.done()


async def test_an_idle_server_that_answers_is_well() -> None:
    async with watching(FakeClient(), FakeProcess(), hang_timeout_s=0.05) as watched:
        await asyncio.sleep(0.2)  # sleep: longer than the hang time
        assert not watched._failure.done()


async def test_an_idle_server_that_answers_nothing_any_more_hangs() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess(), hang_timeout_s=0.05) as watched:
        client.error = DeadlineExceeded("slow")
        with pytest.raises(EngineFailed, match="has done nothing"):
            await watched.failed()


async def test_an_endpoint_that_cannot_be_reached_is_lost_soon() -> None:
    client = FakeClient()
    async with watching(client) as watched:
        client.error = UpstreamLost("refused")
        with pytest.raises(EngineFailed, match="does not answer any more: refused"):
            await watched.failed()


async def test_an_idle_server_is_asked_for_a_token() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess(), health_interval_s=0.05) as watched:
        while client.asked < 2:  # noqa: ASYNC110 - the fake has no event to wait for
            await asyncio.sleep(0.01)
        age_s = watched.load().token_age_s
        assert age_s is not None
        assert age_s < 5


async def test_one_that_makes_none_has_failed() -> None:
    client = FakeClient()
    client.makes = False
    async with watching(client, FakeProcess(), health_interval_s=0.05) as watched:
        with pytest.raises(EngineFailed, match="made none"):
            await watched.failed()


async def test_a_busy_server_is_not_asked() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess(), health_interval_s=0.02) as watched:
        with watched.request():
            await asyncio.sleep(0.1)  # sleep: longer than the interval
        client.step(running=1)  # another's
        asked = client.asked
        await asyncio.sleep(0.1)  # sleep: longer than the interval
        assert client.asked <= asked + 1


async def test_others_of_a_running_server_are_counted() -> None:
    client = FakeClient()
    async with watching(client) as watched:
        with watched.request():
            client.step(running=3, waiting=2)
            for _ in range(2):
                await watched.look()
            load = watched.load()
            assert (load.others_running, load.others_waiting) == (3, 1)


async def test_a_server_of_ours_has_no_others() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess()) as watched:
        client.step(running=3)
        for _ in range(2):
            await watched.look()
        assert watched.load().others_running == 0


async def test_the_speed_is_the_servers_own() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess()) as watched:
        assert watched.load().tokens_per_s is None
        client.step(decoded_tokens=100, busy_s=2.0)
        await watched.look()
        assert watched.load().tokens_per_s == 50.0
