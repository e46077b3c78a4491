"""Scenes: what is drawn is what the answers say."""

from __future__ import annotations

import io
import math
from itertools import combinations
from random import Random

import pytest
from PIL import Image

from models.pocket import questions
from models.pocket.exam import SECTIONS, items
from models.pocket.questions import KINDS, any_question
from models.pocket.scenes import COLORS, SHAPES, Scene, Thing, draw, png, random_scene

RED_CIRCLE = Thing("circle", "red", x=0.2, y=0.5, radius=0.1)
BLUE_STAR = Thing("star", "blue", x=0.5, y=0.5, radius=0.1)
BLUE_CIRCLE = Thing("circle", "blue", x=0.8, y=0.9, radius=0.1)
TWO = Scene("gray", (RED_CIRCLE, BLUE_STAR))
THREE = Scene("white", (RED_CIRCLE, BLUE_STAR, BLUE_CIRCLE))


def asked(scene: Scene, kind: str) -> set[tuple[str, str]]:
    """Fact and answer of every question of this kind, over many draws."""
    drawn = (KINDS[kind](scene, Random(seed)) for seed in range(300))
    return {(one.fact, one.answer) for one in drawn if one is not None and one.kind == kind}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_things_do_not_touch(count: int) -> None:
    for seed in range(200):
        scene = random_scene(Random(seed), count=count)
        assert len(scene.things) == count
        assert list(scene.things) == sorted(scene.things, key=lambda thing: thing.x)
        for thing in scene.things:
            assert thing.color != scene.background
            assert thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        for one, other in combinations(scene.things, 2):
            assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_a_thing_has_its_color_where_it_is(shape: str, color: str) -> None:
    background = "gray"
    scene = Scene(background, (Thing(shape, color, x=0.3, y=0.6, radius=0.15),))
    image = draw(scene, Random(shape + color), (200, 100))
    tints = [
        max(abs(a - b) for a, b in zip(image.getpixel((60, 60)), tint, strict=True))  # type: ignore[arg-type]
        for tint in COLORS[color]
    ]
    assert min(tints) <= 10
    red, green, blue = image.getpixel((5, 5))  # type: ignore[misc]
    assert max(red, green, blue) - min(red, green, blue) <= 10


def test_a_seed_is_a_picture() -> None:
    one, again, other = (draw(random_scene(Random(s)), Random(s)) for s in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert Image.open(io.BytesIO(png(one))).tobytes() == one.tobytes()


def test_answers_about_two_things() -> None:
    assert asked(TWO, "what") == set()
    assert asked(TWO, "count") == {("two", "There are two shapes.")}
    assert asked(TWO, "background") == {("gray", "The background is gray.")}
    assert asked(TWO, "color") == {
        ("red", "The circle is red."),
        ("blue", "The star is blue."),
    }
    assert asked(TWO, "shape") == {
        ("circle", "The red shape is a circle."),
        ("star", "The blue shape is a star."),
    }
    assert asked(TWO, "describe") == {
        ("a red circle and a blue star", "I see a red circle and a blue star on a gray background.")
    }
    assert asked(TWO, "relation") == {
        ("red circle", "The red circle is left of the blue star."),
        ("blue star", "The blue star is right of the red circle."),
    }


def test_a_question_with_two_answers_is_not_asked() -> None:
    assert asked(THREE, "color") == {("blue", "The star is blue.")}
    assert asked(THREE, "shape") == {("circle", "The red shape is a circle.")}


def test_yes_and_no() -> None:
    for seed in range(300):
        question = questions.exists(THREE, Random(seed))
        name = next(f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" in question.text)
        there = name in ("red circle", "blue star", "blue circle")
        assert question.fact == ("yes" if there else "no")
        assert name in question.answer


def test_counting_one_kind() -> None:
    facts = {
        question.text: question.fact
        for question in (questions.count_of(THREE, Random(seed)) for seed in range(500))
    }
    assert facts["How many circles are there?"] == "two"
    assert facts["How many stars are there?"] == "one"
    assert facts["How many crosses are there?"] == "no"
    assert facts["How many blue shapes are there?"] == "two"


def test_what_is_not_there_is_said_so() -> None:
    answers = {
        question.answer
        for question in (questions.color(TWO, Random(seed)) for seed in range(300))
        if question is not None and question.kind == "missing"
    }
    assert "There is no square." in answers
    assert not any("circle" in answer or "star" in answer for answer in answers)


def test_every_answer_holds_its_fact() -> None:
    random = Random(3)
    for _ in range(500):
        question = any_question(random, random_scene(random), dict.fromkeys(KINDS, 1.0))
        assert question.fact.lower() in question.answer.lower()


def test_the_exam_is_the_same_for_everybody_and_not_the_same_question_again() -> None:
    for section in SECTIONS:
        one, again, other = (
            [(item.messages[0].text, item.answer) for item in items(section, 20, seed)]
            for seed in (1, 1, 2)
        )
        assert one == again != other
        assert len(one) >= 20
        assert len(set(one)) > 5, section.name
