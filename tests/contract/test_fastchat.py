"""What FastChat's servers ask of a worker: its conversation, its tokens and whole answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.contract.conftest import START_TIMEOUT_S, Worker
from tests.pictures import encoded, picture
from tests.streams import ask, user

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)

ASKED: dict[str, Any] = {"model": "pocket-llava", "temperature": 0, "max_new_tokens": 30}
QUESTION = "What is Tandem?"


def post(worker: Worker, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{worker.address}{path}", json=ASKED | body, timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def written(worker: Worker, text: str, system: str | None = None) -> str:
    """One round, as FastChat writes it by the worker's conversation."""
    conv = post(worker, "/worker_get_conv_template")["conv"]
    colon = ":" if conv["sep_style"] == 2 else ""
    message = conv["system_message"] if system is None else system
    prompt = conv["system_template"].format(system_message=message)
    prompt += conv["sep"] if colon else ""
    prompt += conv["roles"][0] + (colon and colon + " ") + text + conv["sep"]
    return str(prompt + conv["roles"][1] + colon)


def test_its_conversation_and_its_messages_are_the_same_prompt(worker: Worker) -> None:
    prompt = written(worker, QUESTION)
    messages = ask(worker.address, **ASKED, messages=user(QUESTION))
    answer = post(worker, "/worker_generate", prompt=prompt, echo=False)
    assert answer["error_code"] == 0
    if worker.kind != "echo":  # which says again what it was sent
        assert answer["text"] == messages.text
        assert answer["usage"]["prompt_tokens"] == messages.finished.prompt_tokens
        assert answer["finish_reason"] == messages.finished.reason
    counted = post(worker, "/count_token", prompt=prompt)
    assert counted == {"count": answer["usage"]["prompt_tokens"], "error_code": 0}


def test_a_system_message_of_fastchats(worker: Worker) -> None:
    system = [{"role": "system", "content": "Be brief."}, *user(QUESTION)]
    messages = ask(worker.address, **ASKED, messages=system)
    prompt = written(worker, QUESTION, "Be brief.")
    answer = post(worker, "/worker_generate", prompt=prompt, echo=False)
    if worker.kind != "echo":
        assert answer["text"] == messages.text
        assert answer["usage"]["prompt_tokens"] == messages.finished.prompt_tokens


def test_a_picture_of_fastchats(worker: Worker) -> None:
    prompt = written(worker, "$$<image>$$What is it?")
    image = encoded(picture())
    answer = post(worker, "/worker_generate", prompt=prompt, images=[image], echo=False)
    assert answer["error_code"] == 0
    messages = ask(worker.address, **ASKED, messages=user("<image>What is it?"), images=[image])
    if worker.kind != "echo":
        assert answer["text"] == messages.text


def test_the_length_of_its_context(worker: Worker) -> None:
    assert post(worker, "/model_details")["context_length"] > 1000
