"""The questions the model is judged by.

Pictures are drawn from seeds that training never uses, and facts about Tandem are asked also in
phrasings that were kept back. Counting and names are whole sets, which training saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image

from models.pocket import questions, talk
from models.pocket.questions import NOT_SEEN, Question
from models.pocket.scenes import Scene, draw, random_scene


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says; pictures come before the text."""

    role: str  # user or assistant
    text: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """What a user says, message by message, and the right answer to the last of them.

    The model's answers in between are its own. ``fact`` is the part of the answer that must be
    right whatever the style; empty where only the whole answer counts.
    """

    kind: str
    messages: tuple[Message, ...]
    answer: str
    fact: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A skill; ``target`` is the share of exact answers that the model was made to reach."""

    name: str
    target: float | None
    items: Callable[[Random, int], Iterator[Item]]


def _about(kind: str, *counts: int) -> Callable[[Random, int], Iterator[Item]]:
    """Questions of one kind about pictures with one of ``counts`` things, equally often each."""

    def items(random: Random, number: int) -> Iterator[Item]:
        made = 0
        while made < number:
            scene = random_scene(random, count=counts[made % len(counts)])
            question = questions.KINDS[kind](scene, random)
            # A question after something that is not there has a section of its own.
            if question is None or question.kind != kind:
                continue
            made += 1
            yield _item(question, scene, random)

    return items


def _item(question: Question, scene: Scene, random: Random) -> Item:
    message = Message("user", question.text, (picture(scene, random),))
    return Item(question.kind, (message,), question.answer, question.fact)


def picture(scene: Scene, random: Random) -> Image.Image:
    """``scene`` in one of the sizes that people send."""
    return draw(scene, random, random.choice(((112, 112), (224, 224), (320, 240), (200, 260))))


def _missing(random: Random, number: int) -> Iterator[Item]:
    made = 0
    while made < number:
        scene = random_scene(random)
        kind = random.choice((questions.color, questions.shape))
        question = kind(scene, random)
        if question is not None and question.kind == "missing":
            made += 1
            yield _item(question, scene, random)


def _follow_ups(random: Random, number: int) -> Iterator[Item]:
    """A second question about the same picture."""
    kinds = ("color", "shape", "count", "exists", "background")
    made = 0
    while made < number:
        scene = random_scene(random)
        first, second = (questions.KINDS[kind](scene, random) for kind in random.sample(kinds, 2))
        if first is None or second is None or "missing" in (first.kind, second.kind):
            continue
        made += 1
        yield Item(
            second.kind,
            (
                Message("user", first.text, (picture(scene, random),)),
                Message("user", second.text),
            ),
            second.answer,
            second.fact,
        )


def _two_pictures(random: Random, number: int) -> Iterator[Item]:
    for _ in range(number):
        scenes = [random_scene(random, count=1) for _ in range(2)]
        which = random.randrange(2)
        text = f"What is in the {('first', 'second')[which]} picture?"
        name = scenes[which].things[0].name
        pictures = tuple(picture(scene, random) for scene in scenes)
        answer = f"This is {questions.with_article(name)}."
        yield Item("pair", (Message("user", text, pictures),), answer, name)


def _no_image(random: Random, number: int) -> Iterator[Item]:
    for _ in range(number):
        question = questions.any_question(
            random, random_scene(random), dict.fromkeys(questions.KINDS, 1.0)
        )
        yield Item("no_image", (Message("user", question.text),), NOT_SEEN)


def _count_to(random: Random, number: int) -> Iterator[Item]:
    for index in range(number):
        turn = talk.count_to(random, index % talk.COUNT_TO + 1)  # every number as often
        yield Item(turn.kind, (Message("user", turn.text),), turn.answer)


def _facts(phrasings: str) -> Callable[[Random, int], Iterator[Item]]:
    """Every fact at least once, in one of its phrasings; in others, as long as ``number`` asks."""

    def items(random: Random, number: int) -> Iterator[Item]:
        facts = [fact for fact in talk.facts() if getattr(fact, phrasings)]
        random.shuffle(facts)
        for index in range(max(number, len(facts))):
            fact = facts[index % len(facts)]
            yield Item(
                "fact", (Message("user", random.choice(getattr(fact, phrasings))),), fact.answer
            )

    return items


def _beyond(random: Random, number: int) -> Iterator[Item]:
    unseen = talk.elsewhere("unseen")
    for text in random.sample(unseen, min(number, len(unseen))):
        yield Item("beyond", (Message("user", text),), talk.BEYOND)


def _repeat(random: Random, number: int) -> Iterator[Item]:
    for _ in range(number):
        turn = talk.repeat(random)
        yield Item(turn.kind, (Message("user", turn.text),), turn.answer)


def _name(random: Random, number: int) -> Iterator[Item]:
    for _ in range(number):
        told, asked = talk.name(random)
        messages = (
            Message("user", told.text),
            Message("user", asked.text),
        )
        yield Item(asked.kind, messages, asked.answer)


def _section(name: str, target: float | None, kind: str, *counts: int) -> Section:
    return Section(name, target, _about(kind, *counts))


SECTIONS = (
    _section("colour of a single object", 0.98, "its_color", 1),
    _section("shape of a single object", 0.98, "its_shape", 1),
    _section("what is this?", 0.98, "what", 1),
    _section("how many objects, 1 to 4", 0.95, "count", 1, 2, 3, 4),
    _section("colour of a named shape, 2 to 4 objects", 0.90, "color", 2, 3, 4),
    _section("shape of a named colour, 2 to 4 objects", 0.90, "shape", 2, 3, 4),
    _section("is there a red circle?", 0.90, "exists", 1, 2, 3, 4),
    _section("background", 0.98, "background", 1, 2, 3, 4),
    Section("count to N, 1 to 100", 0.98, _count_to),
    Section("facts, phrasings of the training", 0.98, _facts("seen")),
    Section("facts, unseen phrasings", 0.90, _facts("unseen")),
    Section("facts, unseen general forms", 0.90, _facts("unseen_forms")),
    Section("follow-up about the same picture", None, _follow_ups),
    Section("no image is there", None, _no_image),
    Section("the polite limit, unseen questions", None, _beyond),
    Section("asked of a thing that is not there", None, _missing),
    _section("how many of one shape or colour", None, "count_of", 1, 2, 3, 4),
    _section("describe the picture", None, "describe", 1, 2, 3, 4),
    _section("left, right, above, below", None, "relation", 2, 3),
    Section("which of two pictures", None, _two_pictures),
    Section("a name told before", None, _name),
    Section("repeat words and other scripts", None, _repeat),
)


def items(section: Section, number: int, seed: int = 2026) -> Iterator[Item]:
    """About ``number`` questions of ``section``; the same for the same ``seed``."""
    return section.items(Random(f"exam {seed} {section.name}"), number)
