"""The same request to either kind gives the same tokens: float32, greedy, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol.messages import WorkerStatus
from tests.contract.conftest import START_TIMEOUT_S, Workers
from tests.pictures import encoded, picture
from tests.processes import running
from tests.streams import ask, user

pytestmark = pytest.mark.timeout(2 * START_TIMEOUT_S + 60)

TEXTS = [
    "How do I start a worker?",
    "What is RadixAttention?",
    "Count from 1 to 12.",
    "Hello!",
    "Wie geht es dir? ☃",
]
QUESTIONS = ["What color is the circle?", "What is this?", "How many objects are there?"]
PICTURES = [("circle", "red"), ("square", "blue"), ("circle", "green")]


@pytest.mark.parametrize("text", TEXTS)
def test_text(workers: Workers, text: str) -> None:
    fields: dict[str, Any] = {"model": "pocket-llava", "messages": user(text), "temperature": 0}
    hf = ask(workers["hf"].address, **fields, max_new_tokens=48)
    sglang = ask(workers["sglang"].address, **fields, max_new_tokens=48)
    assert hf.token_ids == sglang.token_ids
    assert hf.text == sglang.text
    assert hf.finished.prompt_tokens == sglang.finished.prompt_tokens
    assert hf.finished.reason == sglang.finished.reason


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(("shape", "colour"), PICTURES)
def test_pictures(workers: Workers, question: str, shape: str, colour: str) -> None:
    fields: dict[str, Any] = {
        "model": "pocket-llava",
        "messages": user("<image>" + question),
        "images": [encoded(picture(shape, colour))],
        "temperature": 0,
        "max_new_tokens": 32,
    }
    hf = ask(workers["hf"].address, **fields)
    sglang = ask(workers["sglang"].address, **fields)
    assert hf.token_ids == sglang.token_ids
    assert hf.text == sglang.text
    assert hf.finished.prompt_tokens == sglang.finished.prompt_tokens


def test_a_raw_prompt_with_two_pictures(workers: Workers) -> None:
    fields: dict[str, Any] = {
        "model": "pocket-llava",
        "prompt": "<image><image>What do you see?",
        "images": [encoded(picture("circle", "red")), encoded(picture("square", "blue"), "BMP")],
        "temperature": 0,
        "max_new_tokens": 24,
    }
    assert (
        ask(workers["hf"].address, **fields).token_ids
        == ask(workers["sglang"].address, **fields).token_ids
    )


def test_the_second_question_about_a_picture_is_cached(workers: Workers) -> None:
    image = encoded(picture("square", "orange"))
    answers = [
        ask(
            workers["sglang"].address,
            model="pocket-llava",
            messages=user("<image>" + question),
            images=[image],
            temperature=0,
            max_new_tokens=16,
        )
        for question in ("What is this?", "What color is the square?")
    ]
    assert answers[1].finished.cached_tokens >= 49, "all of the picture's tokens"
    response = httpx.post(f"{workers['sglang'].address}/worker_get_status")
    cache = WorkerStatus.model_validate_json(response.content).cache
    assert cache is not None
    assert cache.hit_rate > 0
    assert 0 < cache.used_tokens <= cache.size_tokens


def test_a_worker_attached_to_a_running_sglang_server(workers: Workers, tmp_path: Path) -> None:
    """--sgl-endpoint: the same server, and the same answers, without starting another."""
    children = psutil.Process(workers["sglang"].process.pid).children()
    command = next(child.cmdline() for child in children if "--port" in child.cmdline())
    endpoint = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    flags = ("--port", "0", "--no-register", "--sgl-endpoint", endpoint)
    with running(tmp_path, "workers.sglang", *flags) as attached:
        address = attached.wait_ready(START_TIMEOUT_S)
        assert not psutil.Process(attached.pid).children()
        fields: dict[str, Any] = {
            "model": "pocket-llava",
            "messages": user("<image>What is this?"),
            "images": [encoded(picture("circle", "green"))],
            "temperature": 0,
        }
        answer = ask(address, **fields)
        assert answer.token_ids == ask(workers["sglang"].address, **fields).token_ids
        assert answer.text
    assert ask(workers["sglang"].address, **fields).text == answer.text, "it was not stopped"
