"""Jobs on a model that is loaded in this process: what tests of the Hugging Face engine share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from protocol.errors import TandemError
from protocol.events import Delta, Finished
from protocol.messages import ChatMessage, GenerateRequest
from workers.hf.job import Job, prepare
from workers.hf.model import HfModel
from workers.hf.scheduler import Deliver, Item
from workers.images import decode

MODEL = "pocket-llava"


def asked(text: str, *images: str, **fields: Any) -> GenerateRequest:
    """A greedy request; each of ``images`` (base64) stands before ``text``."""
    content = "<image>" * len(images) + text
    given: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_new_tokens": 40} | fields
    return GenerateRequest(
        messages=(ChatMessage(role="user", content=content),), images=images, **given
    )


def job_of(model: HfModel, request: GenerateRequest) -> Job:
    pictures = decode(request.images, max_pixels=10**8)
    return prepare(model, request, pictures, threading.Event())


class Answers:
    """What jobs are told, by job; ``deliver`` is called from the thread that computes."""

    def __init__(self) -> None:
        self.items: dict[Job, list[Item]] = {}
        self._changed = threading.Condition()

    def deliver(self, items: Sequence[tuple[Job, Item]]) -> None:
        with self._changed:
            for job, item in items:
                self.items.setdefault(job, []).append(item)
            self._changed.notify_all()

    def wait(self, check: Callable[[], bool], timeout_s: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(check, timeout_s), self.items

    def ended(self, job: Job) -> bool:
        items = self.items.get(job, [])
        return bool(items) and not isinstance(items[-1], Delta)

    def end(self, job: Job) -> Item:
        """What it was told last, once it has ended."""
        self.wait(lambda: self.ended(job))
        return self.items[job][-1]

    def text(self, job: Job) -> str:
        """The whole answer, once it is complete."""
        end = self.end(job)
        assert isinstance(end, Finished), end
        return "".join(item.text for item in self.items[job] if isinstance(item, Delta))

    def failure(self, job: Job) -> TandemError:
        end = self.end(job)
        assert isinstance(end, TandemError), end
        return end


Runner = Any
"""A ``Scheduler`` or ``Threads``."""


@contextmanager
def running(start: Callable[[Deliver], Runner]) -> Iterator[tuple[Runner, Answers]]:
    """A runner that is closed with the block."""
    answers = Answers()
    runner = start(answers.deliver)
    try:
        yield runner, answers
    finally:
        for job in answers.items:
            job.cancelled.set()
        runner.close()
        runner.join(10)
