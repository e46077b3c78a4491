"""Each answer in a thread of its own, by transformers' ``generate()``: LLaVA's flow.

For models whose answers cannot share a batch, and as what the batch is measured against.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from protocol.errors import EngineFailed, TandemError
from workers.hf import cancel, failures
from workers.hf.job import Job, advance, lengthened, on_device
from workers.hf.scheduler import Deliver, Item, stopped

log = logging.getLogger(__name__)


class Threads:
    """As many jobs at once as there are threads; the interface is ``Scheduler``'s."""

    def __init__(self, threads: int, *, deliver: Deliver) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="generation")
        self._deliver = deliver
        self._gate = _Gate()

    def submit(self, job: Job) -> None:
        try:
            self._pool.submit(job.context.run, self._work, job)
        except RuntimeError:  # closed
            self._deliver([(job, stopped())])

    def wake(self) -> None:
        """A job was cancelled; one that computes asks by itself."""
        self._gate.wake()

    def between(self, work: Callable[[], None]) -> Future[None]:
        """Run ``work`` when the answers that compute now are complete.

        Raises:
            EngineFailed: this is closed.
        """
        try:
            return self._pool.submit(self._gate.alone, work)
        except RuntimeError as exc:
            raise stopped() from exc

    def close(self) -> None:
        """Take no more jobs; those that are here end when they are cancelled."""
        self._pool.shutdown(wait=False)

    def join(self, timeout_s: float) -> None:
        """Nothing: the threads end with their jobs, which are cancelled."""

    def _work(self, job: Job) -> None:
        with self._gate.open_to(job.cancelled):
            item = self._generate(job)
        self._deliver([(job, item)])

    def _generate(self, job: Job) -> Item:
        try:
            with (
                cancel.cancellable(job.cancelled),
                torch.inference_mode(),
                job.model.adapters.rows([job.adapter]),
            ):
                generate(job, self._deliver)
            return job.finished()
        except cancel.Cancelled:
            return None
        except TandemError as error:
            return error
        except Exception as exc:
            log.exception("generation failed")
            return failures.as_typed(exc)


def generate(job: Job, deliver: Deliver) -> None:
    """Answer ``job`` in this thread.

    Raises:
        Cancelled: it was cancelled.
        TandemError: it cannot go on.
    """
    whole = job.model.exact
    inputs = lengthened(job.inputs, job.ids if whole else ())
    replay = [] if whole else list(job.ids)
    replayed = 0
    model = job.model

    def choose(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by generate() for each token: all scores but that of the chosen one vanish."""
        nonlocal replayed
        cancel.check()
        if replayed < len(replay):
            token_id = replay[replayed]
            replayed += 1
        else:
            (result,) = advance([job], scores.float())
            if isinstance(result, Exception):
                raise result
            token_id = job.ids[-1]
            deliver([(job, result)])
        alone = torch.full_like(scores, float("-inf"))
        alone[0, token_id] = 0.0
        return alone

    def ended(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([job.answer.reason is not None], device=input_ids.device)

    model.network.generate(
        **on_device(inputs, model.network),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=len(replay) + job.answer.tokens_left
        ),
        logits_processor=LogitsProcessorList([choose]),
        stopping_criteria=StoppingCriteriaList([ended]),
    )
    if job.answer.reason is None:
        raise EngineFailed("The model stopped before its answer was complete.")


class _Gate:
    """Many may be inside, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def open_to(self, cancelled: threading.Event) -> Iterator[None]:
        """Be inside; one that is cancelled waits for nobody, as it does nothing there."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone or cancelled.is_set())
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def alone(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            work()
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
