"""Questions about a scene, with the one right answer to each.

A kind of question is a function of a scene; it returns None where the scene has no such question
(nothing to compare, two circles where one is asked about).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from models.pocket.scenes import COLORS, SHAPES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
NOT_SEEN = "I see no image. Please send me a picture."

_APART = 0.09  # of the picture's side: things nearer than this are neither left nor right


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer; ``fact`` is the word or words that make the answer right."""

    kind: str
    text: str
    answer: str
    fact: str


def _one(phrasings: str, random: Random, **words: str) -> str:
    """One of the ``phrasings`` (parted by |), with the words put in; color in either spelling."""
    text = random.choice(phrasings.split("|")).format(**words)
    return text.replace("color", "colour") if random.random() < 0.5 else text


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _unique(things: tuple[Thing, ...], key: Callable[[Thing], str]) -> list[Thing]:
    counts = Counter(map(key, things))
    return [thing for thing in things if counts[key(thing)] == 1]


def what(scene: Scene, random: Random) -> Question | None:
    if len(scene.things) != 1:
        return None
    text = _one(
        "What is this?|What is it?|What is shown here?|Which object is shown?|What do I show you?"
        "|What shape and color is this?",
        random,
    )
    name = scene.things[0].name
    return Question("what", text, f"This is {with_article(name)}.", name)


def its_color(scene: Scene, random: Random) -> Question | None:
    if len(scene.things) != 1:
        return None
    text = _one(
        "What color is it?|What color is this?|Which color is it?|What is its color?"
        "|What color is the object?|What color is the shape?",
        random,
    )
    color = scene.things[0].color
    return Question("its_color", text, f"It is {color}.", color)


def its_shape(scene: Scene, random: Random) -> Question | None:
    if len(scene.things) != 1:
        return None
    text = _one(
        "What shape is it?|What shape is this?|Which shape is it?|What is its shape?"
        "|What shape is the object?",
        random,
    )
    shape = scene.things[0].shape
    return Question("its_shape", text, f"It is {with_article(shape)}.", shape)


def color(scene: Scene, random: Random) -> Question | None:
    unique = _unique(scene.things, lambda thing: thing.shape)
    present = {thing.shape for thing in scene.things}
    missing = random.random() < 0.1
    if not unique and not missing:
        return None
    shape = (
        random.choice([shape for shape in SHAPES if shape not in present])
        if missing
        else random.choice(unique).shape
    )
    text = _one(
        "What color is the {shape}?|What is the color of the {shape}?|Which color is the {shape}?"
        "|Which color does the {shape} have?|Tell me the color of the {shape}.",
        random,
        shape=shape,
    )
    if missing:
        return Question("missing", text, f"There is no {shape}.", "no")
    seen = next(thing.color for thing in unique if thing.shape == shape)
    return Question("color", text, f"The {shape} is {seen}.", seen)


def shape(scene: Scene, random: Random) -> Question | None:
    unique = _unique(scene.things, lambda thing: thing.color)
    present = {thing.color for thing in scene.things} | {scene.background}
    missing = random.random() < 0.1
    if not unique and not missing:
        return None
    color = (
        random.choice([color for color in COLORS if color not in present])
        if missing
        else random.choice(unique).color
    )
    text = _one(
        "What shape is {color}?|Which shape is {color}?|What is {color}?|What is the {color} shape?"
        "|What shape is the {color} object?",
        random,
        color=color,
    )
    if missing:
        return Question("missing", text, f"There is no {color} shape.", "no")
    seen = next(thing.shape for thing in unique if thing.color == color)
    return Question("shape", text, f"The {color} shape is {with_article(seen)}.", seen)


def _there_are(number: int, noun: str) -> str:
    if number == 1:
        return f"There is one {noun}."
    return f"There are {NUMBERS[number]} {plural(noun)}."


def count(scene: Scene, random: Random) -> Question:
    text = _one(
        "How many shapes are there?|How many objects are there?|How many shapes do you see?"
        "|How many objects are in the picture?|How many things are in the image?|Count the shapes."
        "|Count the objects.",
        random,
    )
    number = len(scene.things)
    return Question("count", text, _there_are(number, "shape"), NUMBERS[number])


def count_of(scene: Scene, random: Random) -> Question:
    """How many of one shape, or of one color."""
    thing = random.choice(scene.things)
    if random.random() < 0.5:
        noun = thing.shape if random.random() < 0.75 else random.choice(SHAPES)
        number = sum(other.shape == noun for other in scene.things)
        text = _one(
            "How many {many} are there?|How many {many} do you see?|Count the {many}.",
            random,
            many=plural(noun),
        )
    else:
        color = thing.color if random.random() < 0.75 else random.choice(list(COLORS))
        noun = f"{color} shape"
        number = sum(other.color == color for other in scene.things)
        text = _one(
            "How many {color} shapes are there?|How many shapes are {color}?", random, color=color
        )
    return Question("count_of", text, _there_are(number, noun), NUMBERS[number])


def exists(scene: Scene, random: Random) -> Question:
    thing = random.choice(scene.things)
    which = random.random()
    color = thing.color if which < 0.75 else random.choice(list(COLORS))
    shape = thing.shape if not 0.5 <= which < 0.75 else random.choice(SHAPES)
    name = f"{color} {shape}"
    text = _one(
        "Is there {a_name}?|Do you see {a_name}?|Can you see {a_name}?",
        random,
        a_name=with_article(name),
    )
    if any(thing.name == name for thing in scene.things):
        return Question("exists", text, f"Yes, there is {with_article(name)}.", "yes")
    return Question("exists", text, f"No, there is no {name}.", "no")


def background(scene: Scene, random: Random) -> Question:
    text = _one(
        "What color is the background?|What is the background color?|Which color is the background?"
        "|What is the color of the background?",
        random,
    )
    return Question("background", text, f"The background is {scene.background}.", scene.background)


def describe(scene: Scene, random: Random) -> Question | None:
    xs = [thing.x for thing in scene.things]
    if any(right - left < _APART for left, right in pairwise(xs)):
        return None  # the answer names the things from left to right
    text = _one(
        "Describe the picture.|Describe the image.|What is in the picture?|What is in the image?"
        "|What do you see?|What does the picture show?",
        random,
    )
    names = [with_article(thing.name) for thing in scene.things]
    listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    answer = f"I see {listed} on a {scene.background} background."
    return Question("describe", text, answer, listed)


_SIDES: dict[str, Callable[[Thing, Thing], float]] = {  # how far the first lies on that side
    "left of": lambda one, other: other.x - one.x,
    "right of": lambda one, other: one.x - other.x,
    "above": lambda one, other: other.y - one.y,
    "below": lambda one, other: one.y - other.y,
}


def relation(scene: Scene, random: Random) -> Question | None:
    """What lies on one side of a thing, where that is one thing and is clear."""
    unique = _unique(scene.things, lambda thing: thing.name)
    questions = []
    for other in unique:
        for side, distance in _SIDES.items():
            distances = {
                thing: distance(thing, other) for thing in scene.things if thing is not other
            }
            there = [thing for thing, far in distances.items() if far > _APART]
            if (
                len(there) == 1
                and there[0] in unique
                and all(abs(far) > _APART for far in distances.values())
            ):
                questions.append((there[0], side, other))
    if not questions:
        return None
    thing, side, other = random.choice(questions)
    text = f"What is {side} the {other.name}?"
    return Question("relation", text, f"The {thing.name} is {side} the {other.name}.", thing.name)


KINDS: dict[str, Callable[[Scene, Random], Question | None]] = {
    "what": what,
    "its_color": its_color,
    "its_shape": its_shape,
    "color": color,
    "shape": shape,
    "count": count,
    "count_of": count_of,
    "exists": exists,
    "background": background,
    "describe": describe,
    "relation": relation,
}


def any_question(random: Random, scene: Scene, weights: dict[str, float]) -> Question:
    """A question whose kind is drawn by ``weights``; kinds that do not fit are drawn again."""
    while True:
        kind = random.choices(list(weights), list(weights.values()))[0]
        if (question := KINDS[kind](scene, random)) is not None:
            return question
