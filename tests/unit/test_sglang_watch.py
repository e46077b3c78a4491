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
    """A server by what it answers; ``step`` moves its first scheduler on."""

    base_url = "http://fake:1"

    def __init__(self) -> None:
        self.now = Load(
            (0.0,), (0,), running=0, waiting=0, held_tokens=0, decoded_tokens=0, busy_s=0
        )
        self.error: Exception | None = None
        self.odd_answers = 0  # to come
        self.adapters_changing = 0
        self.awaited_s = 0.0
        self.makes = True
        self.answers: list[bool] = []  # to come before it ``makes``
        self.others = False  # another's request comes while it is asked for a token
        self.asked = 0
        self.was_cut = False

    def step(self, **fields: Any) -> None:
        known = {name: getattr(self.now, name) for name in Load.__slots__}
        first, *rest = self.now.steps
        known["steps"] = (first + 1, *rest)
        if "running" in fields:
            known["requests"] = (fields["running"] + fields.get("waiting", 0),)
        self.now = Load(**known | fields)

    async def load(self) -> Load:
        if self.odd_answers:
            self.odd_answers -= 1
            raise EngineFailed("status 502")
        if self.error is not None:
            raise self.error
        return self.now

    async def makes_a_token(self) -> bool:
        self.asked += 1
        if self.others:
            self.step(running=1)
            await asyncio.sleep(0.05)  # sleep: looks come between
        return self.answers.pop(0) if self.answers else self.makes

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


async def hangs(requests: tuple[int, int]) -> bool:
    """Whether a server of two copies, of which the first steps on, is taken to hang."""
    client = FakeClient()
    client.now = Load((0.0, 0.0), requests, sum(requests), 0, 0, decoded_tokens=0, busy_s=0)
    async with watching(client, FakeProcess(), hang_timeout_s=0.3) as watched:
        client.awaited_s = 99.0
        with watched.request() as heard:
            for _ in range(60):
                client.step()
                heard()
                await asyncio.sleep(0.01)  # sleep: steps take a while
            return watched._failure.done()


async def test_one_copy_of_two_hangs() -> None:
    assert await hangs((1, 1))


async def test_a_copy_that_has_nothing_to_do_does_not_hang() -> None:
    assert not await hangs((1, 0))


async def test_tokens_are_signs_of_life_of_a_single_copy() -> None:
    """Its scheduler tells its load at every 15th step only."""
    client = FakeClient()
    async with watching(client, FakeProcess(), hang_timeout_s=0.3) as watched:
        client.awaited_s = 99.0
        client.step(running=1)
        with watched.request() as heard:
            for _ in range(60):
                heard()
                await asyncio.sleep(0.01)  # sleep: tokens take a while
            assert not watched._failure.done()


async def test_one_odd_answer_is_forgiven() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess()) as watched:
        for _ in range(3):
            client.odd_answers = 1
            client.step()
            while watched._load != client.now:  # noqa: ASYNC110 - the fake has no event
                await asyncio.sleep(0.005)
        assert not watched._failure.done()


@pytest.mark.parametrize("ours", [False, True])
async def test_odd_answers_in_a_row_are_not(ours: bool) -> None:
    client = FakeClient()
    async with watching(client, FakeProcess() if ours else None) as watched:
        client.odd_answers = watch.LOST_AFTER
        with pytest.raises(EngineFailed, match="status 502"):
            await watched.failed()


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
        token_s = watched._token_s
        while client.asked < 2:  # noqa: ASYNC110 - the fake has no event to wait for
            await asyncio.sleep(0.01)
        # What it made for the first is known before it is asked for the second.
        assert watched._token_s > token_s + 0.05


async def test_one_that_makes_none_has_failed() -> None:
    client = FakeClient()
    client.makes = False
    async with watching(client, FakeProcess(), health_interval_s=0.05) as watched:
        with pytest.raises(EngineFailed, match="made none"):
            await watched.failed()

        assert client.asked == 2, "once in vain is no proof"


async def test_that_its_schedulers_step_is_no_proof_of_tokens() -> None:
    """They do so without anything to do: what is dead may be the process after them."""
    client = FakeClient()
    client.makes = False
    async with watching(client, FakeProcess(), health_interval_s=0.05) as watched:
        while not watched._failure.done():
            client.step()
            await asyncio.sleep(0.01)
        with pytest.raises(EngineFailed, match="made none"):
            await watched.failed()


async def test_a_token_between_two_in_vain_clears_the_doubt() -> None:
    client = FakeClient()
    client.answers = [False, True, False, True]
    async with watching(client, FakeProcess(), health_interval_s=0.02) as watched:
        while client.asked < 5:  # noqa: ASYNC110 - the fake has no event to wait for
            await asyncio.sleep(0.005)
        assert not watched._failure.done()


async def test_what_comes_in_the_way_of_a_token_is_no_failure() -> None:
    client = FakeClient()
    client.makes = False
    async with watching(client, FakeProcess(), health_interval_s=0.02) as watched:
        client.others = True
        for _ in range(3):
            asked_s = watched._asked_s
            while watched._asked_s == asked_s:  # noqa: ASYNC110 - the fake has no event to wait for
                await asyncio.sleep(0.005)
            client.step(running=0)
        assert not watched._failure.done()


async def test_a_busy_server_is_not_asked() -> None:
    client = FakeClient()
    async with watching(client, FakeProcess(), health_interval_s=0.02) as watched:
        with watched.request():
            await asyncio.sleep(0.1)  # sleep: longer than the interval
            assert client.asked == 0
            client.step(running=1)  # another's
            await watched.look()
        await asyncio.sleep(0.1)  # sleep: longer than the interval
        assert client.asked == 0
        client.adapters_changing = 1
        client.step(running=0)
        await asyncio.sleep(0.1)  # sleep: longer than the interval
        assert client.asked == 0


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
