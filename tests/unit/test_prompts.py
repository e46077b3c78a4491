"""workers.prompts: one text for every kind, and the model's image token under control.

pytest tests/unit/test_prompts.py
"""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import InvalidRequest, Unsupported
from protocol.messages import ChatMessage, GenerateRequest
from workers.prompts import PromptText, render

IMAGE_TOKEN = "<|pad|>"


def template(turns: list[dict[str, Any]]) -> str:
    """Parts and strings, as a model's own template would take either."""
    lines = []
    for turn in turns:
        content = turn["content"]
        if not isinstance(content, str):
            content = "".join(
                IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in content
            )
        lines.append(f"{turn['role']}: {content}")
    return "\n".join([*lines, "assistant:"])


def ask(content: Any, images: int = 0) -> GenerateRequest:
    turn = ChatMessage(role="user", content=content)
    return GenerateRequest(model="m", messages=(turn,), images=("x",) * images)


def test_a_prompt_keeps_its_text_and_gets_the_models_image_token() -> None:
    request = GenerateRequest(model="m", prompt="USER: <image>\nWhat?", images=("x",))
    prompt = render(request, image_token=IMAGE_TOKEN, apply_template=template)
    assert prompt == PromptText("USER: <|pad|>\nWhat?", add_special_tokens=True)


def test_a_template_writes_the_special_tokens_itself() -> None:
    prompt = render(ask("What?"), image_token=IMAGE_TOKEN, apply_template=template)
    assert prompt == PromptText("user: What?\nassistant:", add_special_tokens=False)


def test_placeholders_and_parts_say_the_same() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    texts = {
        render(ask(content, 1), image_token=IMAGE_TOKEN, apply_template=template).text
        for content in ("<image>What?", parts)
    }
    assert texts == {"user: <|pad|>What?\nassistant:"}


def test_a_plain_model_gets_strings() -> None:
    seen: list[Any] = []

    def spy(turns: list[dict[str, Any]]) -> str:
        seen.extend(turns)
        return template(turns)

    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    render(ask(parts), image_token=None, apply_template=spy)
    assert seen == [{"role": "user", "content": "a b"}]


def test_a_plain_model_refuses_images() -> None:
    with pytest.raises(Unsupported, match="no images"):
        render(ask("<image>What?", 1), image_token=None, apply_template=template)


def test_without_a_template_messages_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        render(ask("What?"), image_token=None, apply_template=None)


@pytest.mark.parametrize("images", [0, 1])
def test_the_models_own_image_token_cannot_be_smuggled_in(images: int) -> None:
    request = ask("<image>" * images + f"What is {IMAGE_TOKEN}?", images)
    with pytest.raises(InvalidRequest, match=r"<\|pad\|>"):
        render(request, image_token=IMAGE_TOKEN, apply_template=template)


def test_what_a_template_refuses_is_the_requests_fault() -> None:
    def refuse(turns: list[dict[str, Any]]) -> str:
        raise RuntimeError("roles must alternate")

    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render(ask("What?"), image_token=None, apply_template=refuse)
