"""workers.hf.batch and scheduler: whatever is in the batch, an answer is what it is alone.

"Alone" is transformers' own ``generate()``, in float32, where both compute the same numbers.

pytest tests/unit/test_hf_batch.py
"""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from protocol.errors import EngineFailed, OutOfMemory
from protocol.events import Delta, Finished
from protocol.messages import GenerateRequest
from tests.hf import asked, job_of, running
from tests.pictures import encoded, picture
from workers.hf import sampling
from workers.hf.batch import Batch
from workers.hf.job import Job
from workers.hf.kv import KvRows
from workers.hf.loading import load
from workers.hf.model import HfModel
from workers.hf.scheduler import Deliver, Scheduler
from workers.hf.settings import HfSettings
from workers.hf.threads import Threads

pytestmark = pytest.mark.timeout(180)

RED = encoded(picture("circle", "red"))
BLUE = encoded(picture("square", "blue", size=200))
ADAPTERS = ("formal=models/adapters/formal", "terse=models/adapters/terse")


@pytest.fixture(scope="module")
def model() -> HfModel:
    return load(HfSettings(dtype="float32", device="cpu", adapter=ADAPTERS), lambda _: None)


def batched(model: HfModel, chunk_tokens: int = 64) -> Any:
    def start(deliver: Deliver) -> Scheduler:
        batch = Batch(model, chunk_tokens=chunk_tokens)
        return Scheduler(batch, prefill_tokens=chunk_tokens, deliver=deliver)

    return running(start)


def alone(model: HfModel, request: GenerateRequest) -> tuple[list[int], str]:
    """Ids and text by transformers' generate()."""
    job = job_of(model, request)
    with running(lambda deliver: Threads(1, deliver=deliver)) as (runner, answers):
        runner.submit(job)
        return job.ids, answers.text(job)


SAMPLING: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 0.8, "seed": 11},
    {"temperature": 1.5, "seed": 12, "top_p": 0.9},
    {"temperature": 1.0, "seed": 13, "top_k": 20, "min_p": 0.02},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"stop": ("seven", " 7")},
    {"adapter": "formal"},
    {"adapter": "terse"},
    {"logprobs": 2},
    {"regex": "[a-c ]{3,9}"},
]
QUESTIONS: list[tuple[str, tuple[str, ...]]] = [
    ("Count from 1 to 12.", ()),
    ("What is Tandem?", ()),
    ("Show me some emoji.", ()),
    ("What color is the circle?", (RED,)),
    ("Describe the picture.", (BLUE,)),
    ("Hello! " * 40, ()),
]


@pytest.fixture(scope="module")
def expected(model: HfModel) -> list[tuple[GenerateRequest, list[int], str]]:
    """Requests of every sort and their answers alone."""
    requests = [
        asked(*[text, *images], **sampling, max_new_tokens=24)
        for number, (text, images) in enumerate(QUESTIONS)
        for sampling in SAMPLING[number % 2 :: 2]
    ]
    return [(request, *alone(model, request)) for request in requests]


def test_random_mixes_answer_as_alone(
    model: HfModel, expected: list[tuple[GenerateRequest, list[int], str]]
) -> None:
    """They come at random moments, and some are cancelled at random moments."""
    source = random.Random(4)
    with batched(model, chunk_tokens=16) as (runner, answers):
        for _ in range(30):
            mix = source.choices(expected, k=source.randrange(2, 9))
            jobs: list[Job] = []
            for request, _, _ in mix:
                if jobs and source.random() < 0.6:  # in the middle of another's answer
                    one, tokens = source.choice(jobs), source.randrange(1, 12)
                    answers.wait(
                        lambda one=one, tokens=tokens: answers.ended(one) or len(one.ids) >= tokens
                    )
                jobs.append(job_of(model, request))
                runner.submit(jobs[-1])
                if source.random() < 0.15:
                    jobs[-1].cancelled.set()
                    runner.wake()
            for job, (request, ids, text) in zip(jobs, mix, strict=True):
                if job.cancelled.is_set() and answers.end(job) is None:
                    assert job.ids == ids[: len(job.ids)], request
                    continue
                assert answers.text(job) == text, request
                assert job.ids == ids, request
            answers.items.clear()


def test_pieces_of_a_prompt_change_nothing(model: HfModel) -> None:
    request = asked("Hello! " * 60, RED)
    ids, _ = alone(model, request)
    for chunk_tokens in (7, 64, 2048):
        with batched(model, chunk_tokens) as (runner, answers):
            job = job_of(model, request)
            runner.submit(job)
            answers.text(job)
            assert job.ids == ids, chunk_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.9, "seed": 5, "top_p": 0.95},
        {"repetition_penalty": 1.4, "stop": ("e ", "ou")},
        {"regex": "[A-Z][a-z ]{8,30}[.]"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_gives_the_same_tokens(dtype: Any, fields: dict[str, Any]) -> None:
    """In bfloat16, too, where a prompt's pass rounds otherwise than the steps did."""
    model = load(HfSettings(dtype=dtype, device="cpu"), lambda _: None)
    for text, images in QUESTIONS[2:5]:
        with batched(model) as (runner, answers):
            whole = job_of(model, asked(text, *images, **fields))
            runner.submit(whole)
            said = answers.text(whole)
            cuts = {1, 2, len(whole.ids) // 2, len(whole.ids) - 1}
            for cut in sorted(cuts & set(range(1, len(whole.ids)))):
                resume = tuple(whole.ids[:cut])
                rest = job_of(model, asked(text, *images, **fields, resume_token_ids=resume))
                runner.submit(rest)
                assert said.endswith(answers.text(rest))
                assert rest.ids == whole.ids, (text, cut)


class Fault:
    """Raises within the network's third layer, whenever ``when`` says so."""

    def __init__(self, model: HfModel) -> None:
        self.when: Any = lambda rows: False
        self.how: Any = lambda: torch.empty(1 << 60)  # the allocator's own words
        layer = model.network.get_decoder().layers[2]
        self._hook = layer.register_forward_pre_hook(self._ask)

    def _ask(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if self.when(arguments[0].shape):
            self.how()

    def remove(self) -> None:
        self._hook.remove()


@pytest.fixture
def fault(model: HfModel) -> Iterator[Fault]:
    fault = Fault(model)
    yield fault
    fault.remove()


def test_out_of_memory_ends_the_longest_and_the_others_go_on(model: HfModel, fault: Fault) -> None:
    short, long = asked("Count from 1 to 12."), asked("Hello! " * 40, max_new_tokens=200)
    ids, _ = alone(model, short)
    with batched(model) as (runner, answers):
        first, second, big = job_of(model, short), job_of(model, short), job_of(model, long)
        fault.when = lambda shape: shape[0] == 3 and len(big.ids) > 5
        for job in (first, big, second):
            runner.submit(job)
        assert isinstance(answers.failure(big), OutOfMemory)
        for job in (first, second):
            answers.text(job)
            assert job.ids == ids


def test_out_of_memory_on_a_prompt_is_that_prompts_own(model: HfModel, fault: Fault) -> None:
    short, long = asked("Count from 1 to 12."), asked("Hello! " * 60)
    ids, _ = alone(model, short)
    with batched(model) as (runner, answers):
        first = job_of(model, short)
        runner.submit(first)
        answers.wait(lambda: len(first.ids) > 2)
        fault.when = lambda shape: shape[1] > 50
        big = job_of(model, long)
        runner.submit(big)
        assert isinstance(answers.failure(big), OutOfMemory)
        answers.text(first)
        assert first.ids == ids


def test_a_step_that_fails_ends_all_and_the_next_request_is_served(
    model: HfModel, fault: Fault
) -> None:
    request = asked("Count from 1 to 12.")
    ids, _ = alone(model, request)

    def fail() -> None:
        raise RuntimeError("a kernel that does not like this shape")

    fault.how = fail
    with batched(model) as (runner, answers):
        fault.when = lambda shape: shape[0] == 2
        jobs = [job_of(model, request) for _ in range(2)]
        for job in jobs:
            runner.submit(job)
        for job in jobs:
            assert isinstance(answers.failure(job), EngineFailed)
        after = job_of(model, request)
        runner.submit(after)
        answers.text(after)
        assert after.ids == ids


def test_a_closed_scheduler_leaves_nobody_waiting(model: HfModel) -> None:
    with batched(model) as (runner, answers):
        jobs = [job_of(model, asked("Count from 1 to 100.", max_new_tokens=900)) for _ in range(3)]
        for job in jobs:
            runner.submit(job)
        answers.wait(lambda: len(jobs[0].ids) > 2)
        runner.close()
        for job in jobs:
            assert isinstance(answers.failure(job), EngineFailed)


def test_a_draw_that_fails_is_that_jobs_own(
    model: HfModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As out of memory would in the draws of a large vocabulary."""
    greedy, sampled = asked("Count from 1 to 12."), asked("Hello", temperature=1.0, seed=1)
    ids, _ = alone(model, greedy)

    def fail(*_: Any) -> Any:
        torch.empty(1 << 60)

    monkeypatch.setattr(sampling, "_draw", fail)
    with batched(model) as (runner, answers):
        jobs = [job_of(model, request) for request in (greedy, sampled, greedy)]
        for job in jobs:
            runner.submit(job)
        assert isinstance(answers.failure(jobs[1]), OutOfMemory)
        for job in (jobs[0], jobs[2]):
            answers.text(job)
            assert job.ids == ids


def test_a_turn_that_fails_leaves_nobody_waiting(
    model: HfModel, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even what clears up after a failed prompt may fail, as on a dead accelerator."""

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    fault.how = fail
    with batched(model) as (runner, answers):
        monkeypatch.setattr(KvRows, "clear", fail)
        fault.when = lambda shape: True
        jobs = [job_of(model, asked("Count from 1 to 12.")) for _ in range(3)]
        for job in jobs:
            runner.submit(job)
        for job in jobs:
            assert isinstance(answers.failure(job), EngineFailed)


def test_what_nobody_waits_for_any_more_ends_nothing(model: HfModel) -> None:
    """An adapter that was being loaded when its request was cancelled."""
    ids, _ = alone(model, asked("Count from 1 to 12."))
    with batched(model) as (runner, answers):
        job = job_of(model, asked("Count from 1 to 12."))
        runner.submit(job)
        done = threading.Event()
        given_up = runner.between(done.clear)
        given_up.cancel()
        runner.between(done.set).result(20)
        assert done.is_set()
        answers.text(job)
        assert job.ids == ids


@pytest.mark.parametrize("threads", [False, True])
def test_who_comes_after_the_end_is_told(model: HfModel, threads: bool) -> None:
    with (
        running(lambda deliver: Threads(1, deliver=deliver)) if threads else batched(model) as (
            runner,
            answers,
        )
    ):
        runner.close()
        job = job_of(model, asked("Hello"))
        runner.submit(job)
        assert isinstance(answers.failure(job), EngineFailed)
        with pytest.raises(EngineFailed):
            runner.between(lambda: None)


def tensors() -> int:
    """How many tensors live."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_two_hundred_cancelled_requests_leave_no_tensor(model: HfModel) -> None:
    """Cancelled while they wait, in their prompt and in their answer."""
    source = random.Random(6)

    def cancel_some(number: int) -> None:
        with batched(model, chunk_tokens=16) as (runner, answers):
            for _ in range(number):
                job = job_of(model, asked("Hello! " * 30, RED, max_new_tokens=300))
                runner.submit(job)
                tokens = source.randrange(0, 6)
                if tokens:
                    answers.wait(lambda job=job, tokens=tokens: len(job.ids) >= tokens)
                job.cancelled.set()
                runner.wake()
                assert answers.end(job) is None
                answers.items.clear()

    cancel_some(5)
    before = tensors()
    cancel_some(200)
    assert tensors() <= before


def test_what_it_says_adds_up(model: HfModel) -> None:
    with batched(model) as (runner, answers):
        job = job_of(model, asked("What color is the circle?", RED))
        runner.submit(job)
        end = answers.end(job)
        assert isinstance(end, Finished)
        deltas = [item for item in answers.items[job] if isinstance(item, Delta)]
        assert [i for delta in deltas for i in delta.token_ids] == job.ids
        assert end.completion_tokens == len(job.ids)
        assert "red" in "".join(delta.text for delta in deltas)


def test_many_answers_at_once(model: HfModel) -> None:
    """More rows than any power of two of the buffer, and all of them leave."""
    ids, _ = alone(model, asked("Count from 1 to 12."))
    with batched(model) as (runner, answers):
        jobs = [job_of(model, asked("Count from 1 to 12.")) for _ in range(21)]
        for job in jobs:
            runner.submit(job)
        assert all(answers.text(job) for job in jobs)
        assert all(job.ids == ids for job in jobs)
