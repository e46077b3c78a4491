"""What is asked: workloads drawn from a seed, so that every target is asked the same.

    chat     conversations of four turns; their users share a few long system prompts
    vqa      many users, one picture a round, a question each
    vchat    conversations about a picture of one's own
    long     long answers to short questions
    random   words that begin differently each time: nothing to reuse, a control
    trace    what a file says, when it says so

The turns of a conversation hold the right answers, not those of the target: what a target is asked
does not depend on what it said before.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import orjson

from bench.wire import Ask
from models.pocket import exam, scenes, talk
from models.pocket.questions import KINDS, Question, any_question

TURNS = 4  # of a conversation
PICTURE = (336, 336)
_SYSTEM_PROMPTS = 4
_SYSTEM_FACTS = 12  # some 200 tokens of the embedded model
_ANY_KIND = dict.fromkeys(KINDS, 1.0)
_SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mo", "ni", "pu", "ra", "se", "ti", "vo", "zu")

Turns = tuple[tuple[str, str], ...]


class WorkloadError(Exception):
    """A workload cannot be made; the text is a sentence."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``asks(seed, round, user)`` is what one user asks in one round, without end."""

    name: str
    what: str
    asks: Callable[[int, int, int], Iterator[Ask]]
    shares: str  # what could be reused, in words


def plan(
    workload: Workload, *, seed: int, round_number: int, users: int, requests: int
) -> list[list[Ask]]:
    """For each user what they ask in a round: the same for the same arguments.

    All ask equally often; together at least ``requests`` times.
    """
    each = -(-requests // users)
    return [
        list(itertools.islice(workload.asks(seed, round_number, user), each))
        for user in range(users)
    ]


def arrivals(asks: Sequence[Ask], *, rate: float, seed: int) -> list[tuple[float, Ask]]:
    """``asks`` with the seconds at which they come: a Poisson process of ``rate`` a second."""
    random = Random(f"arrivals {seed} {rate}")
    at_s = 0.0
    found = []
    for ask in asks:
        at_s += random.expovariate(rate)
        found.append((at_s, ask))
    return found


# ---------------------------------------------------------------- the workloads


def _chat(seed: int, round_number: int, user: int) -> Iterator[Ask]:
    for number in itertools.count():
        random = Random(f"chat {seed} {round_number} {user} {number}")
        turns: Turns = (("system", _system_prompt(seed, user % _SYSTEM_PROMPTS)),)
        for _ in range(TURNS):
            fact = random.choice(talk.facts())
            turns = (*turns, ("user", random.choice(fact.seen)))
            yield Ask(turns, max_new_tokens=64, answer=fact.answer)
            turns = (*turns, ("assistant", fact.answer))


def _system_prompt(seed: int, number: int) -> str:
    random = Random(f"system {seed} {number}")
    facts = random.sample(talk.facts(), _SYSTEM_FACTS)
    return " ".join([f"You are helper {number}.", *(fact.answer for fact in facts)])


def _vqa(seed: int, round_number: int, user: int) -> Iterator[Ask]:
    scene, image = _picture(f"vqa {seed} {round_number}")
    random = Random(f"vqa {seed} {round_number} {user}")
    while True:
        question = any_question(random, scene, _ANY_KIND)
        yield _about(image, question)


def _vchat(seed: int, round_number: int, user: int) -> Iterator[Ask]:
    for number in itertools.count():
        scene, image = _picture(f"vchat {seed} {round_number} {user} {number}")
        random = Random(f"vchat {seed} {round_number} {user} {number} questions")
        turns: Turns = ()
        for _ in range(TURNS):
            question = any_question(random, scene, _ANY_KIND)
            turns = (*turns, ("user", "<image>" * (not turns) + question.text))
            yield Ask(turns, (image,), answer=question.answer, fact=question.fact)
            turns = (*turns, ("assistant", question.answer))


def _long(seed: int, round_number: int, user: int) -> Iterator[Ask]:
    random = Random(f"long {seed} {round_number} {user}")
    while True:
        turn = talk.count_to(random, random.randint(80, talk.COUNT_TO))
        yield Ask((("user", turn.text),), max_new_tokens=256, answer=turn.answer)


def _random(seed: int, round_number: int, user: int) -> Iterator[Ask]:
    random = Random(f"random {seed} {round_number} {user}")
    while True:
        words = (
            "".join(random.choices(_SYLLABLES, k=random.randint(1, 3)))
            for _ in range(random.randint(30, 60))
        )
        yield Ask((("user", " ".join(words)),), max_new_tokens=32)


def _picture(seed: str) -> tuple[scenes.Scene, str]:
    random = Random(f"{seed} picture")
    scene = scenes.random_scene(random)
    return scene, encoded(scenes.png(scenes.draw(scene, random, PICTURE)))


def encoded(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _about(image: str, question: Question) -> Ask:
    turns = (("user", "<image>" + question.text),)
    return Ask(turns, (image,), answer=question.answer, fact=question.fact)


WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "chat",
            f"conversations of {TURNS} turns under {_SYSTEM_PROMPTS} long system prompts",
            _chat,
            "system prompts and earlier turns",
        ),
        Workload("vqa", "many questions about one picture a round", _vqa, "the picture"),
        Workload(
            "vchat",
            f"conversations of {TURNS} turns, each about a picture of its own",
            _vchat,
            "the picture and earlier turns, within a conversation",
        ),
        Workload(
            "long", "short questions with answers of some 100 tokens", _long, "next to nothing"
        ),
        Workload(
            "random",
            "words that begin differently each time",
            _random,
            "nothing: what caches gain elsewhere must be gone here",
        ),
    )
}


# ---------------------------------------------------------------- the fixed questions of the truth


def truth(number: int) -> list[tuple[str, Ask]]:
    """``number`` questions with one right answer each, and their sorts; the same ones always."""
    sections = {
        section.name: (
            item
            for item in exam.items(section, number, seed=8)
            if len(item.messages) == 1  # else the turns before depend on the target
        )
        for section in exam.SECTIONS
        if section.target is not None  # what the model was made to know
    }
    in_turn = itertools.cycle(sections.items())
    found: list[tuple[str, Ask]] = []
    while len(found) < number:
        name, items = next(in_turn)
        if (item := next(items, None)) is not None:
            found.append((name, _asked(item)))
    return found


def _asked(item: exam.Item) -> Ask:
    (message,) = item.messages
    return Ask(
        (("user", "<image>" * len(message.pictures) + message.text),),
        tuple(encoded(scenes.png(picture)) for picture in message.pictures),
        max_new_tokens=160,
        answer=item.answer,
        fact=item.fact,
    )


# ---------------------------------------------------------------- a trace


def read_trace(path: Path) -> list[tuple[float, Ask]]:
    """The requests of a JSONL file with the seconds at which they come, in order.

    A line: ``{"at_s": 0.5, "prompt": "What is this?", "images": ["draw:1", "cat.png"],
    "max_new_tokens": 64}``, or ``messages`` (role and content) in place of ``prompt``. An image is
    a file beside the trace, base64, or ``draw:N``, a picture that is drawn from a number.

    Raises:
        WorkloadError: a line is none of this.
    """
    found = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise WorkloadError(f"The trace {path} cannot be read: {exc}.") from exc
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            said = orjson.loads(line)
            found.append((float(said.get("at_s", 0.0)), _traced(said, path.parent)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            raise WorkloadError(
                f"{path}, line {number}: {str(exc) or type(exc).__name__}."
            ) from exc
    if not found:
        raise WorkloadError(f"The trace {path} has no requests.")
    return sorted(found, key=lambda arrival: arrival[0])


def _traced(said: dict[str, Any], folder: Path) -> Ask:
    images = tuple(_traced_image(image, folder) for image in said.get("images") or ())
    if (prompt := said.get("prompt")) is not None:
        missing = len(images) - prompt.count("<image>")
        messages: Turns = (("user", "<image>" * missing + prompt),)
    else:
        messages = tuple((turn["role"], turn["content"]) for turn in said["messages"])
    asked = sum(text.count("<image>") for _, text in messages)
    if asked != len(images):
        raise ValueError(f"{asked} <image> for {len(images)} images")
    return Ask(messages, images, max_new_tokens=int(said.get("max_new_tokens", 64)))


def _traced_image(said: str, folder: Path) -> str:
    if said.startswith("draw:"):
        return _picture(f"trace {int(said.removeprefix('draw:'))}")[1]
    if len(said) < 256 and (file := folder / said).is_file():
        return encoded(file.read_bytes())
    base64.b64decode(said, validate=True)
    return said
