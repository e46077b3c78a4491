"""A chat template as one of FastChat's conversations, and what FastChat cannot say put right."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from protocol.errors import InvalidRequest, Unsupported
from protocol.messages import IMAGE_PLACEHOLDER, ChatMessage, TextPart
from workers.conversation import PICTURE, Conversation, Write, derive

Turn = tuple[str, str]


def said(turn: ChatMessage) -> str:
    return "".join(
        part.text if isinstance(part, TextPart) else IMAGE_PLACEHOLDER for part in turn.parts
    )


def template(
    frames: dict[str, Turn], *, begin: str = "", end: str, default: str | None = None
) -> Write:
    """Each turn in the frame of its role; ``default`` is said where there is no system message."""

    async def write(turns: Sequence[ChatMessage]) -> str:
        text = begin
        if default is not None and turns[0].role != "system":
            text += frames["system"][0] + default + frames["system"][1]
        for turn in turns:
            if turn.role not in frames:
                raise InvalidRequest("no such role")
            text += frames[turn.role][0] + said(turn) + frames[turn.role][1]
        return text + end

    return write


POCKET = template(
    {
        "system": ("<|system|>", ""),
        "user": ("<|user|>", ""),
        "assistant": ("<|assistant|>", "</s>"),
    },
    begin="<s>",
    end="<|assistant|>",
)
VICUNA = template(
    {"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT: ", "</s>")},
    end="ASSISTANT:",
    default="Be {kind}.",
)
CHATML = template(
    {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")},
    end="<|im_start|>assistant\n",
    default="You help.",
)
NO_SYSTEM = template(
    {"user": ("<u>", "</u>"), "assistant": ("<a>", "</a>")}, begin="<s>", end="<a>"
)
INSIDE = template(  # the system message stands in the user's first turn
    {"system": ("[INST] ", "\n\n"), "user": ("", "[/INST]"), "assistant": ("", "</s>")}, end=""
)


def turns(words: Sequence[str], system: str | None) -> list[ChatMessage]:
    first = [] if system is None else [ChatMessage(role="system", content=system)]
    return first + [
        ChatMessage(role="assistant" if index % 2 else "user", content=word)
        for index, word in enumerate(words)
    ]


@pytest.mark.parametrize("write", [POCKET, VICUNA, CHATML])
@pytest.mark.parametrize("system", [None, "Answer {briefly}."])
@pytest.mark.parametrize("words", [["Hi"], ["Hi", "Yes?", "What is: it?"], list("abcdefg")])
async def test_fastchats_prompt_is_the_templates(
    write: Write, system: str | None, words: list[str]
) -> None:
    conversation = await derive(write)
    written = conversation.join(system, words)
    assert conversation.prompt_of(written) == await write(turns(words, system))


@pytest.mark.parametrize("write", [POCKET, VICUNA, CHATML])
async def test_without_a_system_message_nothing_has_to_be_put_right(write: Write) -> None:
    conversation = await derive(write)
    assert conversation.join(None, ["Hi"]) == await write(turns(["Hi"], None))


async def test_the_styles() -> None:
    assert (await derive(VICUNA)).wire("m") == {
        "name": "m",
        "system_template": "{system_message}",
        "system_message": "Be {kind}.",
        "roles": ["USER", "ASSISTANT"],
        "messages": [],
        "offset": 0,
        "sep_style": 2,
        "sep": " ",
        "sep2": "</s>",
        "stop_str": None,
        "stop_token_ids": None,
    }
    assert (await derive(POCKET)).wire("m")["sep_style"] == 5


async def test_pictures_stand_where_the_template_puts_them() -> None:
    conversation = await derive(VICUNA)
    written = conversation.join(None, [PICTURE + "What?"])
    expected = turns([IMAGE_PLACEHOLDER + "What?"], None)
    assert conversation.prompt_of(written) == await VICUNA(expected)


async def test_a_prompt_that_fastchat_has_not_written_stays() -> None:
    conversation = await derive(POCKET)
    for prompt in ["Once upon a time", "<s><|user|>Hi", "Hi<|user|>there<|assistant|>"]:
        assert conversation.prompt_of(prompt) == prompt


async def test_a_system_message_that_the_template_refuses() -> None:
    conversation = await derive(NO_SYSTEM)
    assert conversation.prompt_of(conversation.join(None, ["Hi"])) == "<s><u>Hi</u><a>"
    with pytest.raises(Unsupported, match="no system message"):
        conversation.prompt_of(conversation.join("Be brief.", ["Hi"]))


async def test_a_template_that_fastchat_cannot_follow() -> None:
    with pytest.raises(Unsupported, match="cannot be written"):
        await derive(INSIDE)


def test_braces_of_a_template_are_no_fields() -> None:
    conversation = Conversation(False, "{{x}}{system_message}", "", ("U", "A"), "", "")
    assert conversation.join("s", ["u"]) == "{x}sUuA"
