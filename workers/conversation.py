"""A model's chat template in FastChat's terms, for clients that write the prompt themselves.

FastChat's OpenAI server asks a worker for its ``Conversation`` and joins the turns by its rules.
The template is jinja, those rules are two of FastChat's styles, both ending with the assistant's
label; so the template renders a few probes, what stands between their words is taken apart, and a
longer conversation must then come out the same::

    NO_COLON_TWO    system + (user message sep assistant message sep2)* assistant
    ADD_COLON_TWO   the same with ": " behind each label, and sep behind the system message

Two things FastChat cannot say, so ``prompt_of`` puts them right in what comes back: where a system
message stands if there need not be one, and how the template writes a picture.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import InvalidRequest, Unsupported
from protocol.messages import IMAGE_PLACEHOLDER, ChatMessage, ImagePart, TextPart

PICTURE = "$$<image>$$"
"""Where a picture stands in a prompt of FastChat's."""

Write = Callable[[Sequence[ChatMessage]], Awaitable[str]]
"""The prompt that a model reads as these turns."""

_ADD_COLON_TWO = 2  # FastChat's SeparatorStyle
_NO_COLON_TWO = 5
_COLON = ": "

# Words that no template has, and no two the same.
_SYSTEM, *_WORDS = (f"Tandemprobe{letter}" for letter in "XABCDE")


@dataclass(frozen=True, slots=True)
class Probes:
    """What a template makes of the probes; ``None`` where it refuses."""

    one: str  # the first word
    two: str  # the first three words, user and assistant in turn
    three: str  # all five
    system: str | None  # a system message and the first word
    picture: str | None  # a picture and the first word


@dataclass(frozen=True, slots=True)
class Conversation:
    """FastChat's dataclass of this name, as far as two of its styles use it, and what it lacks."""

    colon: bool
    system_template: str
    system_message: str
    roles: tuple[str, str]
    sep: str
    sep2: str
    picture: str | None = None  # how a picture before the user's words is written
    bare: str | None = None  # what FastChat writes before a system message that lacks its frame
    around_system: tuple[str, str] | None = None  # that frame; None: the template takes none

    def wire(self, name: str) -> dict[str, Any]:
        """The JSON of ``/worker_get_conv_template``; the worker itself knows where to stop."""
        return {
            "name": name,
            "system_template": self.system_template,
            "system_message": self.system_message,
            "roles": list(self.roles),
            "messages": [],
            "offset": 0,
            "sep_style": _ADD_COLON_TWO if self.colon else _NO_COLON_TWO,
            "sep": self.sep,
            "sep2": self.sep2,
            "stop_str": None,
            "stop_token_ids": None,
        }

    def join(self, system: str | None, words: Sequence[str]) -> str:
        """The prompt that FastChat writes."""
        message = self.system_message if system is None else system
        text = self.system_template.format(system_message=message)
        text += self.sep if self.colon else ""
        for index, word in enumerate(words):
            label = self.roles[index % 2] + (_COLON if self.colon else "")
            text += label + word + (self.sep, self.sep2)[index % 2]
        return text + self.roles[1] + (":" if self.colon else "")

    def prompt_of(self, written: str) -> str:
        """The model's own prompt for one that FastChat has written.

        Raises:
            Unsupported: it has a system message, and the template takes none.
        """
        if self.picture is not None:
            written = written.replace(PICTURE, self.picture)
        label = self.roles[0] + (_COLON if self.colon else "")
        end = self.roles[1] + (":" if self.colon else "")
        if self.bare is None or not written.startswith(self.bare) or not written.endswith(end):
            return written
        message = written.removeprefix(self.bare)
        system, found, rest = message.partition((self.sep if self.colon else "") + label)
        if not system or not found:
            return written
        if self.around_system is None:
            raise Unsupported(
                "This model's chat template takes no system message.",
                remedy="Say it in the user's first message.",
            )
        before, after = self.around_system
        return before + system + after + rest


async def derive(write: Write) -> Conversation:
    """The conversation of a model whose template ``write`` applies.

    Raises:
        InvalidRequest, Unsupported: it has no template, or none that FastChat could follow.
    """
    picture = ChatMessage(role="user", content=(ImagePart(), TextPart(text=_WORDS[0])))
    return fit(
        Probes(
            one=await write(_turns(1)),
            two=await write(_turns(3)),
            three=await write(_turns(5)),
            system=await _or_none(write, [ChatMessage(role="system", content=_SYSTEM), *_turns(1)]),
            picture=await _or_none(write, [picture]),
        )
    )


def fit(probes: Probes) -> Conversation:
    """The conversation whose ``join`` gives what a template gave.

    Raises:
        Unsupported: there is none.
    """
    for colon in (True, False):
        found = _taken_apart(probes, colon=colon)
        if found is not None and _is_right(found, probes):
            return found
    raise Unsupported(
        "This model's chat template cannot be written as one of FastChat's conversations.",
        remedy="Ask this controller's own /v1/chat/completions, which uses the template.",
    )


def _taken_apart(probes: Probes, *, colon: bool) -> Conversation | None:
    first, second, third = _WORDS[:3]
    begin, found, end = probes.one.partition(first)
    _, _, after_answer = probes.two.partition(second)
    again, found_again, _ = after_answer.partition(third)
    if not found or not found_again:
        return None
    before, between = _around_system(probes)
    label = _common_suffix(*(text for text in (begin, again, between) if text is not None))
    if not label:
        return None
    if colon:
        if not label.endswith(_COLON) or not end.endswith(":"):
            return None
        sep = _joint(end[:-1], begin.removesuffix(label))
    else:
        sep = ""
    system = begin.removesuffix(label).removesuffix(sep)
    template, message = _system_of(system, sep, label, before, between)
    around = None if before is None or between is None else (before, between)
    strip = len(_COLON) if colon else 0
    return Conversation(
        colon=colon,
        system_template=_literal(system) + "{system_message}" if template is None else template,
        system_message=message,
        roles=(label[: len(label) - strip], end.removeprefix(sep)[: -1 if colon else None]),
        sep=sep,
        sep2=again.removesuffix(label),
        picture=_picture(probes.picture, begin, first),
        bare=system if template is None else None,
        around_system=around if template is None else None,
    )


def _around_system(probes: Probes) -> tuple[str | None, str | None]:
    """What stands before a system message, and between it and the user's first word."""
    if probes.system is None or _SYSTEM not in probes.system:
        return None, None
    before, _, rest = probes.system.partition(_SYSTEM)
    between, found, _ = rest.partition(_WORDS[0])
    return (before, between) if found else (None, None)


def _system_of(
    default: str, sep: str, label: str, before: str | None, between: str | None
) -> tuple[str | None, str]:
    """FastChat's template for the system message, and the message where none is given; ``None``
    where it has no frame around one then."""
    if before is None or between is None or not between.endswith(sep + label):
        return None, ""
    after = between.removesuffix(sep + label)
    message = default.removeprefix(before).removesuffix(after)
    if default != before + message + after:
        return None, ""
    return f"{_literal(before)}{{system_message}}{_literal(after)}", message


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _picture(rendered: str | None, begin: str, word: str) -> str | None:
    """What stands for a picture before the user's words."""
    if rendered is None or not rendered.startswith(begin):
        return None
    written, found, _ = rendered.removeprefix(begin).partition(word)
    return written if found and written.count(IMAGE_PLACEHOLDER) == 1 else None


def _is_right(conversation: Conversation, probes: Probes) -> bool:
    wanted: list[tuple[str | None, int, str | None]] = [
        (None, 1, probes.one),
        (None, 3, probes.two),
        (None, 5, probes.three),
        (_SYSTEM, 1, probes.system),
    ]
    return all(
        conversation.prompt_of(conversation.join(system, _WORDS[:count])) == text
        for system, count, text in wanted
        if text is not None
    )


def _common_suffix(*texts: str) -> str:
    shortest = min(texts, key=len)
    starts = range(len(shortest) + 1)
    return next(
        shortest[at:] for at in starts if all(text.endswith(shortest[at:]) for text in texts)
    )


def _joint(text: str, before: str) -> str:
    """The longest beginning of ``text`` that ``before`` ends with."""
    return next(text[:size] for size in range(len(text), -1, -1) if before.endswith(text[:size]))


def _turns(count: int) -> list[ChatMessage]:
    roles = ("user", "assistant")
    return [
        ChatMessage.model_validate({"role": roles[index % 2], "content": word})
        for index, word in enumerate(_WORDS[:count])
    ]


async def _or_none(write: Write, turns: Sequence[ChatMessage]) -> str | None:
    try:
        return await write(turns)
    except (InvalidRequest, Unsupported):
        return None
