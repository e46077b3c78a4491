"""The same directory given to either kind gives the same tokens, whatever its architecture.

Starting a server takes half a minute, so by default only some are; TANDEM_ALL_CHECKPOINTS=1 is
for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from PIL import Image

from protocol.events import Finished
from protocol.messages import GenerateRequest
from tests.checkpoints import make
from tests.hf import asked, job_of
from tests.hf import running as running_model
from tests.pictures import encoded, picture
from tests.processes import running
from tests.streams import Answer, ask
from workers.hf.job import Job
from workers.hf.loading import load
from workers.hf.model import HfModel
from workers.hf.settings import HfSettings
from workers.hf.threads import Threads

START_TIMEOUT_S = 240
pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 120)

ALL = ("llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen2")
SELECTED = ALL if os.environ.get("TANDEM_ALL_CHECKPOINTS") == "1" else ("llava-next", "qwen2.5-vl")
TOKENS = 20
CHUNK_TOKENS = 32  # less than most pictures have, so that the cuts go through them


def noise(width: int, height: int, seed: int) -> str:
    data = Random(seed).randbytes(3 * width * height)
    return encoded(Image.frombytes("RGB", (width, height), data))


def plain(width: int, height: int) -> str:
    return encoded(Image.new("RGB", (width, height), "black"))


SQUARE = encoded(picture())
OTHER = encoded(picture("square", "blue"))
WIDE = noise(180, 60, 1)
HIGH = noise(64, 150, 2)
QUESTIONS: dict[str, tuple[str, ...]] = {
    "Count to ten.": (),
    "Why? " * 30: (),
    "What is it?": (SQUARE,),
    "What is this?": (OTHER,),
    "What is on it?": (WIDE,),
    "And these? ": (HIGH, SQUARE),
    "Which is it? ": (SQUARE, HIGH),
    "What are they?": (WIDE, SQUARE, WIDE),
    # the same pixels once they are cut into tiles
    "Black?": (plain(120, 60),),
    "Black? ": (plain(60, 120),),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, loaded here by transformers and served over there by SGLang."""

    model: HfModel
    address: str

    def expected(self, text: str, *images: str, **fields: Any) -> tuple[Job, Finished]:
        job = job_of(self.model, asked(text, *images, max_new_tokens=TOKENS, **fields))
        with running_model(lambda deliver: Threads(1, deliver=deliver)) as (runner, answers):
            runner.submit(job)
            end = answers.end(job)
        assert isinstance(end, Finished), end
        return job, end

    def answer(self, text: str, *images: str, **fields: Any) -> Answer:
        request = asked(text, *images, max_new_tokens=TOKENS, **fields)
        given = request.model_dump(exclude_unset=True, mode="json")
        return ask(self.address, **given | {"model": "tiny"})

    def raw(self, prompt: str, *images: str, **fields: Any) -> tuple[list[int], list[int]]:
        """The tokens of a prompt that no template has written: expected, and given."""
        request = GenerateRequest(
            model="tiny",
            prompt=prompt,
            images=images,
            temperature=0,
            max_new_tokens=TOKENS,
            **fields,
        )
        with running_model(lambda deliver: Threads(1, deliver=deliver)) as (runner, answers):
            runner.submit(job := job_of(self.model, request))
            assert isinstance(end := answers.end(job), Finished), end
        given = request.model_dump(exclude_unset=True, mode="json")
        return job.ids[len(request.resume_token_ids) :], ask(self.address, **given).token_ids

    def questions(self) -> dict[str, tuple[str, ...]]:
        sees = self.model.image_token is not None
        return {text: images for text, images in QUESTIONS.items() if sees or not images}


@pytest.fixture(scope="module", params=SELECTED)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    path = make(request.param, folder / "tiny")
    flags = ("--port", "0", "--no-register", "--dtype", "float32", "--device", "cpu")
    chunks = ("--", "--chunked-prefill-size", str(CHUNK_TOKENS))
    with running(folder, "workers.sglang", *flags, "--model-path", path, *chunks) as process:
        model = load(HfSettings(model_path=path, dtype="float32", device="cpu"), lambda _: None)
        yield Pair(model, process.wait_ready(START_TIMEOUT_S))


def test_the_tokens_are_those_of_transformers(pair: Pair) -> None:
    questions = pair.questions()
    expected = {text: pair.expected(text, *images) for text, images in questions.items()}
    assert len({tuple(job.ids) for job, _ in expected.values()}) == len(questions), "too alike"
    assert len({i for job, _ in expected.values() for i in job.ids}) > 10, "too monotonous"

    def same(text: str) -> None:
        job, end = expected[text]
        answer = pair.answer(text, *questions[text])
        assert answer.token_ids == job.ids, text
        assert answer.finished.prompt_tokens == job.prompt_tokens
        assert answer.finished.reason == end.reason

    for text in questions:
        same(text)
    with ThreadPoolExecutor() as together:  # cached by now, and in a batch
        list(together.map(same, questions))


def test_a_picture_is_computed_once(pair: Pair) -> None:
    if pair.model.image_token is None:
        pytest.skip("it sees no pictures")
    image, other = noise(130, 90, 3), noise(130, 90, 4)
    first = pair.answer("What is it?", image).finished
    ids = job_of(pair.model, asked("", image)).inputs["input_ids"]
    tokens = int((ids == pair.model.image_token_id).sum())
    assert tokens > CHUNK_TOKENS / 4
    assert first.cached_tokens < tokens
    second = pair.answer("How many are there?", image).finished
    assert second.cached_tokens >= tokens
    assert pair.answer("What is it?", other).finished.cached_tokens < tokens


def test_resuming_goes_on_exactly(pair: Pair) -> None:
    images = (WIDE, SQUARE) if pair.model.image_token is not None else ()
    job, _ = pair.expected("Tell me more.", *images)
    for cut in (1, 9, len(job.ids) - 1):
        rest = pair.answer("Tell me more.", *images, resume_token_ids=job.ids[:cut])
        assert rest.token_ids == job.ids[cut:], cut
        assert rest.finished.prompt_tokens == job.prompt_tokens
        assert rest.finished.completion_tokens == len(job.ids)


def test_an_answer_that_spells_a_placeholder_is_resumed(pair: Pair) -> None:
    """SGLang's own processors read a prompt's text again and would take it for a picture."""
    images = (WIDE,) if pair.model.image_token is not None else ()
    tokenizer = pair.model.tokenizer
    spelled = tuple(i for part in ("<", "image", ">") for i in tokenizer.encode(part))
    assert pair.model.decode(spelled) == "<image>"
    job, _ = pair.expected("Write a tag.", *images, resume_token_ids=spelled)
    rest = pair.answer("Write a tag.", *images, resume_token_ids=spelled)
    assert rest.token_ids == job.ids[len(spelled) :]


VISION_START = "<|vision_start|>"


def test_marks_in_a_clients_prompt_do_not_move_its_pictures(pair: Pair) -> None:
    """SGLang looks for the pictures of Qwen-VL behind these marks, which are text to others."""
    if pair.model.image_token is None:
        pytest.skip("it sees no pictures")
    mark = pair.model.tokenizer.encode(VISION_START, add_special_tokens=False)
    prompts = {
        "Look: <image> What is it?": (WIDE,),
        f"A {VISION_START} and: <image>, <image>. What?": (HIGH, WIDE),
        f"<image> What is it? {VISION_START}": (WIDE,),
    }
    for prompt, images in prompts.items():
        expected, given = pair.raw(prompt, *images)
        assert given == expected, prompt
    expected, given = pair.raw("Is it <image>?", WIDE, resume_token_ids=tuple(mark))
    assert given == expected


def test_a_video_without_a_video_is_text(pair: Pair) -> None:
    """transformers itself takes no such prompt; what counts is that there is an answer."""
    if pair.model.image_token is None:
        pytest.skip("it sees no pictures")
    prompt = f"<image> {VISION_START}<|video_pad|> What is it?"
    answer = ask(
        pair.address, model="tiny", temperature=0, max_new_tokens=5, images=[WIDE], prompt=prompt
    )
    assert answer.token_ids
