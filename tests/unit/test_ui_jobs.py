"""Answers that are being written, against a small server that says what a controller says."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from protocol.errors import Overloaded, UpstreamLost
from protocol.events import Delta, Event, Failed, Finished, encode_sse
from transport import process
from transport.addresses import address_of
from ui.client import Controller, ControllerAway
from ui.jobs import FRAME_S, Job, Jobs
from ui.model import Answer, Settings
from ui.talk import fields_of, messages_of
from ui.watch import Watch, quantile

WORDS = [Delta(text=f"{n} ", token_ids=(n,)) for n in range(5)]
DONE = Finished(reason="stop", prompt_tokens=4, completion_tokens=5, cached_tokens=3)


class Stage:
    """A controller that answers as the test tells it to."""

    def __init__(self) -> None:
        self.events: list[Event] = [*WORDS, DONE]
        self.refusal: Response | None = None
        self.held = asyncio.Event()  # the stream ends only when this is set
        self.held.set()
        self.asked: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.place: dict[str, Any] | None = None
        self.workers: list[dict[str, Any]] = []
        self.kill: Callable[[], Awaitable[None]]

    def app(self) -> Starlette:
        routes = [
            Route("/worker_generate_stream", self._generate, methods=["POST"]),
            Route("/requests/{name}", self._where),
            Route("/cluster", self._cluster),
            Route("/metrics", self._metrics),
        ]
        return Starlette(routes=routes)

    async def _generate(self, request: Request) -> Response:
        self.asked.append(await request.json())
        if self.refusal is not None:
            return self.refusal

        async def stream() -> AsyncIterator[bytes]:
            try:
                for event in self.events[:-1]:
                    yield encode_sse(event)
                await self.held.wait()
                yield encode_sse(self.events[-1])
            finally:
                self.left.set()

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def _where(self, request: Request) -> Response:
        if self.place is None:
            return JSONResponse({"error": {"code": "not_found", "message": "No."}}, 404)
        return JSONResponse(self.place)

    async def _cluster(self, request: Request) -> Response:
        return JSONResponse({"workers": self.workers, "models": [], "load": {"waiting": 2}})

    async def _metrics(self, request: Request) -> Response:
        return Response(
            "# TYPE tandem_time_to_first_token_seconds histogram\n"
            'tandem_time_to_first_token_seconds_bucket{model="a",le="0.5"} 6\n'
            'tandem_time_to_first_token_seconds_bucket{model="a",le="+Inf"} 6\n'
            'tandem_time_to_first_token_seconds_bucket{model="b",le="0.5"} 4\n'
            'tandem_time_to_first_token_seconds_bucket{model="b",le="+Inf"} 4\n'
            "# TYPE tandem_generation_tokens counter\n"
            'tandem_generation_tokens_total{model="a"} 300\n'
            'tandem_generation_tokens_total{model="b"} 200\n'
        )


@asynccontextmanager
async def served(stage: Stage) -> AsyncIterator[Controller]:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    server = process.Server(stage.app(), sock, grace_s=1)
    controller = Controller(address_of(sock))
    await server.start()
    stage.kill = server.kill
    try:
        yield controller
    finally:
        await controller.aclose()
        await server.kill()


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def answer() -> Answer:
    return Answer(1, Settings(model="m"), request_id="r1")


class Saved(list[tuple[str, str]]):
    """What was saved: status and text."""

    async def __call__(self, answer: Answer) -> None:
        self.append((answer.status, answer.text))


@pytest.mark.anyio
async def test_an_answer_is_collected_with_its_figures() -> None:
    stage, saved = Stage(), Saved()
    stage.place = {"state": "running", "worker_id": "hf-1", "kind": "hf", "waiting": None}
    stage.held.clear()
    async with served(stage) as controller:
        job = await Jobs(controller, saved).start("c", answer(), {"model": "m"})
        await until(lambda: job.answer.worker_id)
        stage.held.set()
        await until(lambda: job.ended)
    done = job.answer
    assert (done.status, done.text, done.token_ids) == ("stop", "0 1 2 3 4 ", [0, 1, 2, 3, 4])
    assert (done.worker_id, done.kind) == ("hf-1", "hf")
    assert done.figures.cached_tokens == 3
    assert done.figures.ttft_s is not None
    assert saved[-1] == ("stop", "0 1 2 3 4 ")


@pytest.mark.anyio
async def test_stopping_closes_the_connection_and_keeps_the_text() -> None:
    stage, saved = Stage(), Saved()
    stage.held.clear()
    async with served(stage) as controller:
        jobs = Jobs(controller, saved)
        job = await jobs.start("c", answer(), {"model": "m"})
        await until(lambda: job.text == "0 1 2 3 4 ")
        assert jobs.running == ["c"]
        await jobs.stop("c")
        assert saved[-1] == ("stopped", "0 1 2 3 4 ")
        assert jobs.of("c") is None
        async with asyncio.timeout(5):
            await stage.left.wait()


@pytest.mark.anyio
async def test_a_new_question_stops_the_answer_before_it() -> None:
    stage, saved = Stage(), Saved()
    stage.held.clear()
    async with served(stage) as controller:
        jobs = Jobs(controller, saved)
        first = await jobs.start("c", answer(), {"model": "m"})
        await until(lambda: first.started)
        second = await jobs.start("c", answer(), {"model": "m"})
        assert first.answer.status == "stopped"
        assert jobs.of("c") is second
        stage.held.set()
        await until(lambda: second.ended)


@pytest.mark.anyio
async def test_a_refusal_and_a_loss_are_kept_as_what_they_are() -> None:
    stage, saved = Stage(), Saved()
    refusal = Overloaded("Full.", retry_after_s=7)
    stage.refusal = JSONResponse(refusal.body(), 429)
    async with served(stage) as controller:
        jobs = Jobs(controller, saved)
        job = await jobs.start("c", answer(), {"model": "m"})
        await until(lambda: job.ended)
        failure = job.answer.failure
        assert failure is not None
        assert (failure.code, failure.message, failure.retry_after_s) == ("overloaded", "Full.", 7)
        stage.refusal = None
        stage.events = [*WORDS, Failed.of(UpstreamLost("hf-1 went away."))]
        job = await jobs.start("c", answer(), {"model": "m"})
        await until(lambda: job.ended)
        assert job.answer.failure is not None
        assert job.answer.failure.code == "upstream_lost"
        assert job.answer.token_ids == [0, 1, 2, 3, 4]
        stage.events = [*WORDS, WORDS[0]]  # and then nothing: law L1 is broken
        job = await jobs.start("c", answer(), {"model": "m"})
        await until(lambda: job.ended)
        assert job.answer.failure is not None
        assert job.answer.failure.code == "away"
        await stage.kill()
        job = await jobs.start("c", answer(), {"model": "m"})
        await until(lambda: job.ended)
        assert job.answer.status == "failed"
        assert job.answer.failure is not None
        assert job.answer.failure.message == "nobody listens there"


@pytest.mark.anyio
async def test_a_waiting_question_knows_its_place() -> None:
    stage = Stage()
    stage.events, stage.place = [DONE], {"state": "waiting", "place": 3, "waiting": 5}
    stage.held.clear()
    async with served(stage) as controller:
        job = await Jobs(controller, Saved()).start("c", answer(), {"model": "m"})
        await until(lambda: job.place is not None and job.place.place == 3)
        stage.place = {"state": "waiting", "place": 1, "waiting": 3}
        await until(lambda: job.place is not None and job.place.place == 1)
        stage.held.set()
        await until(lambda: job.ended)


@pytest.mark.anyio
async def test_however_fast_tokens_come_a_page_draws_at_its_pace() -> None:
    stage = Stage()
    stage.events = [*(Delta(text="x", token_ids=(1,)) for _ in range(2000)), DONE]
    stage.held.clear()
    async with served(stage) as controller:
        jobs = Jobs(controller, Saved())
        job = await jobs.start("c", answer(), {"model": "m"})
        begun, drawn = asyncio.get_running_loop().time(), 0
        asyncio.get_running_loop().call_later(0.5, stage.held.set)
        async for _ in jobs.frames(job):
            drawn += 1
        took = asyncio.get_running_loop().time() - begun
    assert 1 <= drawn <= took / FRAME_S + 2
    assert len(job.text) == 2000


@pytest.mark.anyio
async def test_the_watch_sees_the_controller_go_and_come_back() -> None:
    stage = Stage()
    stage.workers = [
        {"worker_id": "hf-1", "model_names": ["m", "m:terse"], "adapters": ["terse"], "kind": "hf"},
        {"worker_id": "hf-2", "model_names": ["n"], "kind": "hf", "state": "starting"},
    ]
    async with served(stage) as controller:
        watch = Watch(controller)
        assert not watch.there
        await watch.look()
        await watch.look()
        assert watch.there
        assert watch.view is not None
        assert watch.view.bases == ["m"]
        assert watch.view.adapters("m") == ["terse"]
        assert watch.view.kinds("m") == ["hf"]
        assert watch.history[-1].waiting == 2
        await stage.kill()
        await watch.look()
        assert watch.away == "nobody listens there"
        assert watch.view is not None, "what was known stays on the page"


@pytest.mark.anyio
async def test_what_answers_may_be_no_controller() -> None:
    async def hello(request: Request) -> Response:
        return Response("<html>hello</html>", media_type="text/html")

    class Other(Stage):
        def app(self) -> Starlette:
            return Starlette(routes=[Route("/{path:path}", hello, methods=["GET", "POST"])])

    async with served(Other()) as controller:
        with pytest.raises(ControllerAway, match="no controller"):
            await controller.cluster()
        job = Job(controller, answer(), {"model": "m"}, Saved())
        await until(lambda: job.ended)
        assert job.answer.failure is not None


def test_quantiles_of_what_came_between_two_looks() -> None:
    before = {"ttft<=0.1": 5.0, "ttft<=1.0": 5.0, "ttft<=+Inf": 5.0}
    now = {"ttft<=0.1": 5.0, "ttft<=1.0": 15.0, "ttft<=+Inf": 15.0}
    assert quantile(before, now, 0.5) == pytest.approx(0.55)
    assert quantile(now, now, 0.5) is None
    assert quantile(now, {"ttft<=0.1": 2.0, "ttft<=+Inf": 2.0}, 0.5) == pytest.approx(0.05)


def test_a_request_tells_the_conversation_as_it_is_shown() -> None:
    from ui.model import Image, Turn

    one, two = Image("1", "a", 1, 1), Image("2", "b", 1, 1)
    turns = [
        Turn(1, "Look <image>", [one], [answer()]),  # never answered
        Turn(2, "Again", [two], [Answer(2, Settings(), text="Yes <image>")]),
        Turn(3, "And?", []),
    ]
    messages, hashes = messages_of(turns, "Be brief.")
    assert hashes == ["1", "2"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [part.get("text") for part in messages[1]["content"]] == [
        None, "Look <image >", None, "Again",
    ]  # fmt: skip
    assert messages[2]["content"] == "Yes <image >"
    from protocol.messages import GenerateRequest

    fields = fields_of(Settings(model="m", seed=1), messages, ["a", "b"], "r")
    assert GenerateRequest.model_validate(fields).placeholders == 2
