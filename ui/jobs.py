"""Answers that are being written: one task a conversation, however many pages watch it.

A page only looks at a job, so a reload, a second tab or another conversation loses nothing: the
job goes on, and what it has is saved. Stopping a job closes its connection, and the worker stops.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

from protocol.errors import TandemError
from protocol.events import Delta, Failed, Finished
from ui.client import Controller, ControllerAway, RequestState
from ui.model import Answer, Failure, Figures

FRAME_S = 0.05
"""A page shows a running answer at most this often."""

CROWD_S = 0.006
"""And less often by this much for each answer that is written at the same time."""

RATE_S = 0.05
"""Tokens that came within less say nothing of a rate: they may have waited together."""

ASK_S = 0.5
SAVE_S = 2.0

log = logging.getLogger(__name__)

Save = Callable[[Answer], Awaitable[None]]


class Job:
    """One request to the controller and what came of it."""

    def __init__(
        self,
        controller: Controller,
        answer: Answer,
        fields: dict[str, Any],
        save: Save,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.answer = answer
        self.place: RequestState | None = None
        self._controller = controller
        self._fields = fields
        self._save = save
        self._clock = clock
        self._begun_at = clock()
        self._first_at: float | None = None
        self._ended_at: float | None = None
        self._received = 0
        self._changed = asyncio.Event()
        self._first = asyncio.Event()
        self._text: list[str] = [answer.text]
        self._task = asyncio.create_task(self._run())

    @property
    def ended(self) -> bool:
        return self._task.done()

    @property
    def started(self) -> bool:
        """Whether a token has come."""
        return self._first_at is not None

    @property
    def waited_s(self) -> float:
        return self._clock() - self._begun_at

    @property
    def ttft_s(self) -> float | None:
        """The time to the first token, once it is there."""
        return None if self._first_at is None else self._first_at - self._begun_at

    @property
    def total_s(self) -> float:
        """How long it has taken, or took."""
        return (self._ended_at or self._clock()) - self._begun_at

    @property
    def tokens_per_s(self) -> float | None:
        """The rate after the first token; ``None`` before there is one worth telling."""
        if self._first_at is None:
            return None
        seconds = (self._ended_at or self._clock()) - self._first_at
        return (self._received - 1) / seconds if seconds >= RATE_S else None

    @property
    def text(self) -> str:
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return self._text[0]

    async def stop(self) -> None:
        """End it as its reader wished, and return when it has."""
        if not self._task.done():
            self._task.cancel()
        await asyncio.wait([self._task])

    async def changed(self, timeout_s: float) -> None:
        """Return when something new is there, or after ``timeout_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()

    def wake(self) -> None:
        """Let whoever waits in ``changed`` look up."""
        self._changed.set()

    async def _run(self) -> None:
        answer = self.answer
        asking = asyncio.create_task(self._ask_where())
        saving = asyncio.create_task(self._save_often())
        try:
            await self._receive()
        except asyncio.CancelledError:
            answer.status = "stopped"
        except TandemError as error:
            self._fail(Failure.of(error))
        except ControllerAway as exc:
            self._fail(Failure(code="away", message=str(exc)))
        except Exception:
            log.exception("an answer ended in a fault", extra={"request_id": answer.request_id})
            self._fail(Failure(code="page_failed", message="The page itself made a mistake."))
        finally:
            self._ended_at = self._clock()
            asking.cancel()
            saving.cancel()
            await asyncio.gather(asking, saving, return_exceptions=True)
            answer.text = self.text
            answer.figures = self._figures()
            await self._save(answer)
            self.wake()

    async def _receive(self) -> None:
        async with aclosing(self._controller.generate(self._fields, self._placed)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    if self._first_at is None:
                        self._first_at = self._clock()
                        self._first.set()
                    self._received += len(event.token_ids) or 1
                    self._text.append(event.text)
                    self.answer.token_ids += event.token_ids
                    self._changed.set()
                elif isinstance(event, Finished):
                    self.answer.status = event.reason
                    self.answer.figures = Figures(
                        prompt_tokens=event.prompt_tokens,
                        completion_tokens=event.completion_tokens,
                        cached_tokens=event.cached_tokens,
                    )
                else:
                    assert isinstance(event, Failed)
                    self._fail(Failure.of(event.error()))

    def _placed(self, worker_id: str, kind: str) -> None:
        self.answer.worker_id, self.answer.kind = worker_id, kind

    def _fail(self, failure: Failure) -> None:
        self.answer.status = "failed"
        self.answer.failure = failure

    def _figures(self) -> Figures:
        told = self.answer.figures
        if not self.started:
            return told
        return told.model_copy(
            update={
                "ttft_s": self.ttft_s,
                "duration_s": self.total_s,
                "tokens_per_s": self.tokens_per_s,
                "completion_tokens": told.completion_tokens or len(self.answer.token_ids),
            }
        )

    async def _ask_where(self) -> None:
        """Until the first token, ask for the place in the queue."""
        for pause_s in chain((0.03, 0.1, 0.25), repeat(ASK_S)):
            try:
                state = await self._controller.request(self.answer.request_id)
            except (TandemError, ControllerAway):
                state = None
            if state is not None:
                self.place = state
                self.answer.worker_id = state.worker_id or self.answer.worker_id
                self.answer.kind = state.kind or self.answer.kind
                self._changed.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._first.wait()
                    return

    async def _save_often(self) -> None:
        """What there is survives this process."""
        while True:
            await asyncio.sleep(SAVE_S)
            if self.started:
                await self._save(replace(self.answer, text=self.text))


class Jobs:
    """The running jobs by conversation."""

    def __init__(self, controller: Controller, save: Save) -> None:
        self._controller = controller
        self._save = save
        self._jobs: dict[str, Job] = {}

    def of(self, conversation: str | None) -> Job | None:
        """The job that writes in this conversation now."""
        job = self._jobs.get(conversation or "")
        return None if job is None or job.ended else job

    @property
    def running(self) -> list[str]:
        """The conversations in which an answer is being written."""
        return [conversation for conversation, job in self._jobs.items() if not job.ended]

    async def start(self, conversation: str, answer: Answer, fields: dict[str, Any]) -> Job:
        """Begin an answer; one that is being written in the same conversation is stopped."""
        await self.stop(conversation)
        self._jobs = {name: job for name, job in self._jobs.items() if not job.ended}
        job = self._jobs[conversation] = Job(self._controller, answer, fields, self._save)
        return job

    async def stop(self, conversation: str | None) -> None:
        """Stop the answer that is being written in this conversation, if there is one."""
        job = self.of(conversation)
        if job is not None:
            await job.stop()

    async def frames(self, job: Job) -> AsyncIterator[None]:
        """One turn for each picture of ``job`` that is worth drawing, until it has ended."""
        while not job.ended:
            yield
            drawn_at = asyncio.get_running_loop().time()
            await job.changed(1.0)
            frame_s = FRAME_S + CROWD_S * len(self.running)
            # Not in ``changed``: tokens that come meanwhile are drawn together.
            await asyncio.sleep(max(0.0, drawn_at + frame_s - asyncio.get_running_loop().time()))

    async def aclose(self) -> None:
        """Stop everything; what was written is saved."""
        await asyncio.gather(*(job.stop() for job in self._jobs.values()))
