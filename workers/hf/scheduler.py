"""The thread that owns the network when requests decode together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from protocol.errors import EngineFailed, TandemError
from protocol.events import Delta, Finished
from workers.hf import cancel, failures
from workers.hf.batch import Batch, Result
from workers.hf.job import Job

log = logging.getLogger(__name__)

Item = Delta | Finished | TandemError | None
"""What a job is told: deltas, then one of the others; ``None`` answers its cancellation."""

Deliver = Callable[[Sequence[tuple[Job, Item]]], None]
"""Called from the thread that computes, once a step."""


class Scheduler:
    """Admits jobs to a batch between decode steps, first come first.

    After every step up to ``prefill_tokens`` of the prompts that wait are computed, at least one
    piece: those who decode go on, and those who wait are not starved.
    """

    def __init__(self, batch: Batch, *, prefill_tokens: int, deliver: Deliver) -> None:
        self._batch = batch
        self._prefill_tokens = prefill_tokens
        self._deliver = deliver
        self._changed = threading.Condition()
        self._open: set[Job] = set()  # have not been told their end
        self._waiting: deque[Job] = deque()
        self._between: deque[Callable[[], None]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job; its items are delivered from now on, ended by one that is no delta."""
        with self._changed:
            if not self._closing:
                self._open.add(job)
                self._waiting.append(job)
                self._changed.notify()
                return
        self._deliver([(job, stopped())])

    def wake(self) -> None:
        """A job was cancelled."""
        with self._changed:
            self._changed.notify()

    def between(self, work: Callable[[], None]) -> Future[None]:
        """Run ``work`` while the network does not compute.

        Raises:
            EngineFailed: this is closed.
        """
        future: Future[None] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                work()
                future.set_result(None)
            except Exception as exc:  # noqa: BLE001 - its caller's
                future.set_exception(exc)

        with self._changed:
            if self._closing:
                raise stopped()
            self._between.append(run)
            self._changed.notify()
        return future

    def close(self) -> None:
        """End the thread after its step; what is still here gets ``EngineFailed``."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    # ---- the thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._next():
                try:
                    self._turn()
                except Exception as exc:
                    # Of many requests; none of them must hang, and the next turn may be well.
                    log.exception("a turn failed")
                    self._batch.clear()
                    with self._changed:
                        begun = self._open.difference(self._waiting)
                    self._tell([(job, failures.as_typed(exc)) for job in begun])
        self._run_between()
        self._batch.clear()
        self._tell([(job, stopped()) for job in list(self._open)])

    def _next(self) -> bool:
        """Wait for something to do; false at the end."""
        while True:
            self._run_between()
            with self._changed:
                if self._closing:
                    return False
                if self._waiting or len(self._batch) or self._batch.filling:
                    return True
                if not self._between:
                    self._changed.wait()

    def _run_between(self) -> None:
        while self._between:
            self._between.popleft()()  # not under the lock: it takes long, and others submit

    def _tell(self, items: Sequence[tuple[Job, Item]]) -> None:
        self._open.difference_update(job for job, item in items if not isinstance(item, Delta))
        self._deliver(items)

    def _turn(self) -> None:
        """Drop who left, compute some of the prompts that wait and one step of the answers."""
        left = [job for job in self._batch.jobs if job.cancelled.is_set()]
        for job in left:
            self._batch.drop(job)
        with self._changed:
            waiting = [job for job in self._waiting if job.cancelled.is_set()]
            for job in waiting:
                self._waiting.remove(job)
        if left or waiting:
            self._tell([(job, None) for job in (*left, *waiting)])
        self._prefill()
        if results := self._batch.step():
            self._tell([item for result in results for item in _items(*result)])

    def _prefill(self) -> None:
        left = self._prefill_tokens
        while left > 0:
            if not self._batch.filling and not self._begin():
                return
            job = self._batch.filling
            assert job is not None
            try:
                tokens, result = self._batch.fill()
            except cancel.Cancelled:
                self._tell([(job, None)])
                continue
            left -= max(tokens, 1)
            if result is not None:
                self._tell(_items(job, result))

    def _begin(self) -> bool:
        """Take the next job that waits, if there is one and room for it."""
        with self._changed:
            if not self._waiting or not self._batch.fits(self._waiting[0]):
                return False
            job = self._waiting.popleft()
        self._batch.begin(job)
        return True


def stopped() -> EngineFailed:
    """What is told to those who are here, or come, when the engine closes."""
    return EngineFailed("The worker stopped before the answer was complete.")


def _items(job: Job, result: Result) -> list[tuple[Job, Item]]:
    """What ``job`` is told of its ``result``."""
    if isinstance(result, Delta):
        ended: list[tuple[Job, Item]] = [] if job.answer.reason is None else [(job, job.finished())]
        return [(job, result), *ended]
    if isinstance(result, TandemError):
        return [(job, result)]
    job.context.run(log.error, "generation failed", exc_info=result)
    return [(job, failures.as_typed(result))]
