"""The prompts by which two kinds of worker are compared, token for token."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from models.pocket import exam, scenes
from models.pocket.questions import KINDS, any_question
from protocol.messages import GenerateRequest

Turns = list[dict[str, str]]
Fields = dict[str, Any]

_SECTIONS = {section.name: section for section in exam.SECTIONS}
_TEXT = (
    "count to N, 1 to 100",
    "facts, phrasings of the training",
    "facts, unseen phrasings",
    "facts, unseen general forms",
    "no image is there",
    "the polite limit, unseen questions",
    "repeat words and other scripts",
)
_EVERY_KIND = dict.fromkeys(KINDS, 1.0)
_STOPS = (".", " is", "e", "1", ", ", "red", "circle", "10")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A greedy request and the word for its sort."""

    sort: str
    request: GenerateRequest


def prompts(
    model: str, adapters: Sequence[str], *, number: int = 300, seed: int = 0
) -> list[Prompt]:
    """``number`` different requests: the same ones for the same arguments.

    Some are text alone, some have one picture or two, a conversation before them, stop strings, or
    one of ``adapters``; all sorts come in turn.
    """
    sorts: dict[str, Callable[[Random], Fields]] = {
        "text": _text,
        "one picture": lambda random: _pictures(random, 1),
        "two pictures": lambda random: _pictures(random, 2),
        "multi-turn": _conversation,
        "stop": lambda random: _any(random) | {"stop": random.sample(_STOPS, 2)},
    }
    if adapters:
        sorts["adapter"] = lambda random: _any(random) | {"adapter": random.choice(adapters)}
    found: dict[str, Prompt] = {}
    random = Random(f"prompts {seed}")
    while len(found) < number:
        sort = list(sorts)[len(found) % len(sorts)]
        fields = {"model": model, "temperature": 0, "max_new_tokens": random.choice((24, 64, 160))}
        request = GenerateRequest.model_validate(fields | sorts[sort](random))
        found.setdefault(request.model_dump_json(exclude={"max_new_tokens"}), Prompt(sort, request))
    return list(found.values())


def _text(random: Random) -> Fields:
    """A question of the exam without pictures."""
    section = _SECTIONS[random.choice(_TEXT)]
    item = random.choice(list(exam.items(section, 12, seed=random.randrange(1000))))
    return {"messages": [_user(item.messages[-1].text)]}


def _pictures(random: Random, number: int) -> Fields:
    """A question about the last of ``number`` pictures, which are often of different sizes."""
    shown = [scenes.random_scene(random) for _ in range(number)]
    question = any_question(random, shown[-1], _EVERY_KIND)
    marks = "<image>" * number
    return {"messages": [_user(marks + question.text)], "images": _drawn(random, shown)}


def _conversation(random: Random) -> Fields:
    """Two or three turns: about a picture as a rule, now and then with another one later."""
    shown = [scenes.random_scene(random)]
    turns: Turns = []
    for turn in range(random.randint(1, 2)):
        question = any_question(random, shown[-1], _EVERY_KIND)
        turns += [_user("<image>" * (turn == 0) + question.text), _assistant(question.answer)]
    again = random.random() < 0.4
    if again:
        shown.append(scenes.random_scene(random))
    last = any_question(random, shown[-1], _EVERY_KIND)
    turns.append(_user("<image>" * again + last.text))
    return {"messages": turns, "images": _drawn(random, shown)}


def _any(random: Random) -> Fields:
    return random.choice((_text, _conversation, lambda drawn: _pictures(drawn, 1)))(random)


def _drawn(random: Random, shown: Sequence[scenes.Scene]) -> list[str]:
    pictures = (exam.picture(scene, random) for scene in shown)
    return [base64.b64encode(scenes.png(picture)).decode() for picture in pictures]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
