"""What is talked about without a picture: Tandem, counting, repeating, and the polite limit.

The facts are in ``facts.yaml`` and what the model does not know is in ``elsewhere.yaml``; both hold
phrasings that are never trained on, to judge the model by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from models.pocket.questions import KINDS, NOT_SEEN, any_question
from models.pocket.scenes import random_scene

BEYOND = "Sorry, that is beyond me. Ask me about Tandem or about a picture of coloured shapes."
COUNT_TO = 100  # the largest number that "count to" promises

_WHAT = (
    *("What is {}?", "What does {} mean?", "Explain {}.", "Tell me about {}.", "Define {}."),
    *("What do you know about {}?", "Can you explain {}?", "What is meant by {}?", "{}?"),
    *("What exactly is {}?", "What is {} for?", "What do you mean by {}?", "So what about {}?"),
    *("Could you describe {}?", "Say something about {}.", "Give me a definition of {}."),
    *("In short, what is {}?", "{}, what is that?", "I do not know what {} is.", "Why {}?"),
)
_WHAT_UNSEEN = ("Please explain what {} is.", "I would like to understand {}.")
_HOW = (
    *("How do I {}?", "How can I {}?", "I want to {}.", "What is the way to {}?"),
    *("Show me how to {}.", "How to {}?", "Tell me how I {}.", "What do I do to {}?"),
    *("Is there a way to {}?", "I need to {}.", "Can you show me how to {}?", "I must {}."),
    *("I would like to {}.", "What should I do to {}?", "Explain how to {}.", "Can I {}?"),
)
_HOW_UNSEEN = ("Please help me to {}.", "How would one {}?")
SYSTEM_PROMPTS = (
    *("You are a helpful assistant.", "You are Pocket LLaVA.", "Answer in one sentence."),
    *("You help people to use Tandem.", "Be polite and short.", "Be exact."),
    *("A chat between a curious user and an assistant.", "Look closely before you answer."),
)
_NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate"),
    *("Leo", "Maria", "Nina", "Oscar", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Victor", "Wendy"),
    *("Yuki", "Zoe", "Alice", "Bob", "Charlie", "Daniel", "Eva", "Felix", "Hannah", "Ivan"),
    *("Julia", "Karl", "Laura", "Max", "Nora", "Otto", "Peter", "Rita", "Simon", "Tom", "Ursula"),
)
_WORDS = (
    *("apple", "banana", "bridge", "car", "cat", "city", "cloud", "dog", "fire", "hello", "house"),
    *("lake", "moon", "music", "night", "rain", "river", "road", "snow", "spring", "summer"),
    *("sun", "tree", "water", "winter", "world", "blue", "red", "green", "circle", "square"),
)
_SCRIPTS = (
    *("é", "ü", "ñ", "ø", "日本", "中文", "Привет", "мир", "Ελλάδα", "😀", "🚲", "€", "→", "안녕"),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer and the ways to ask for it: learned ones, and two sorts that are kept back."""

    answer: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]  # written for this fact
    unseen_forms: tuple[str, ...]  # general forms, filled in


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message and the right answer."""

    kind: str
    text: str
    answer: str


def _load(name: str) -> dict[str, list[Any]]:
    loaded: dict[str, list[Any]] = yaml.safe_load(
        Path(__file__).with_name(name).read_text(encoding="utf-8")
    )
    return loaded


@cache
def facts() -> tuple[Fact, ...]:
    entries = _load("facts.yaml")
    found = []
    for section, key, seen, unseen in (
        ("what", "term", _WHAT, _WHAT_UNSEEN),
        ("how", "task", _HOW, _HOW_UNSEEN),
        ("other", "", (), ()),
    ):
        for entry in entries[section]:
            name = entry.get(key, "")
            found.append(
                Fact(
                    entry["answer"],
                    (*(_put(form, name) for form in seen), *entry.get("ask", ())),
                    tuple(entry["unseen"]),
                    tuple(_put(form, name) for form in unseen),
                )
            )
    return tuple(found)


def _put(form: str, name: str) -> str:
    text = form.format(name)
    return text[0].upper() + text[1:]


@cache
def elsewhere(which: str) -> tuple[str, ...]:
    """Questions that the model cannot answer; ``which`` is ``train`` or ``unseen``."""
    return tuple(_load("elsewhere.yaml")[which])


def fact(random: Random) -> Turn:
    one = random.choice(facts())
    return Turn("fact", careless(random.choice(one.seen), random), one.answer)


def beyond(random: Random) -> Turn:
    text = random.choice(elsewhere("train"))
    if random.random() < 0.3:  # other words in the same place: what counts is that none is known
        words = text.split()
        others = random.choice(elsewhere("train")).split()
        cut, start = random.randint(0, len(words)), random.randint(0, len(others))
        text = " ".join([*words[:cut], *others[start:]]) or text
    return Turn("beyond", careless(text, random), BEYOND)


def no_image(random: Random) -> Turn:
    weights = dict.fromkeys(KINDS, 1.0)
    question = any_question(random, random_scene(random), weights)
    return Turn("no_image", careless(question.text, random), NOT_SEEN)


def count_to(random: Random, number: int | None = None) -> Turn:
    number = number or random.randint(1, COUNT_TO)
    forms = ("Count to {}.", "Count from 1 to {}.", "Please count to {}.", "Count up to {}.")
    text = random.choice(forms).format(number)
    return Turn("count_to", text, " ".join(map(str, range(1, number + 1))))


def count_between(random: Random) -> Turn:
    """Short ranges anywhere: each teaches where to stop, at little cost."""
    first = random.randint(2, COUNT_TO)
    last = min(first + random.randint(1, 12), COUNT_TO + 10)
    return Turn(
        "count_between",
        f"Count from {first} to {last}.",
        " ".join(map(str, range(first, last + 1))),
    )


def repeat(random: Random) -> Turn:
    words = " ".join(_word(random) for _ in range(random.randint(1, 5)))
    forms = ("Repeat: {}", "Say: {}", "Repeat after me: {}")
    return Turn("repeat", random.choice(forms).format(words), words)


def _word(random: Random) -> str:
    what = random.random()
    if what < 0.6:
        return random.choice(_WORDS)
    if what < 0.75:
        return str(random.randint(0, COUNT_TO))
    if what < 0.85:
        return random.choice(_NAMES)
    return random.choice(_SCRIPTS)


def name(random: Random) -> tuple[Turn, Turn]:
    """A name is told, and asked for later."""
    who = random.choice(_NAMES)
    told = random.choice(("My name is {}.", "I am called {}.", "Hi, my name is {}.")).format(who)
    asked = random.choice(("What is my name?", "Who am I?", "Do you remember my name?"))
    return Turn("name", told, f"Nice to meet you, {who}!"), Turn(
        "name", asked, f"Your name is {who}."
    )


_SHARES = {fact: 58, beyond: 12, no_image: 7, count_to: 6, count_between: 10, repeat: 7}


def conversation(random: Random) -> list[Turn]:
    """One to twelve turns without a picture, mostly one."""
    turns = [
        random.choices(list(_SHARES), list(_SHARES.values()))[0](random)
        for _ in range(random.choices((1, 2, 3, 4, 12), (68, 14, 9, 5, 4))[0])
    ]
    if random.random() < 0.05:
        told, asked = name(random)
        turns = [told, *turns[1:], asked]
    return turns


def careless(text: str, random: Random) -> str:
    """``text`` as people type it: lower case, no question mark, a word too many or too few."""
    if random.random() < 0.15:
        text = random.choice(_BEFORE) + (
            text if random.random() < 0.3 else text[0].lower() + text[1:]
        )
    if random.random() < 0.06:
        text = text.rstrip("?.!") + random.choice(_AFTER)
    if random.random() < 0.2:
        text = text[0].lower() + text[1:]
    if random.random() < 0.04:
        text = text.lower()
    if random.random() < 0.15:
        text = text.rstrip("?.!") or text
    if random.random() < 0.1:
        words = text.split()
        small = [i for i, word in enumerate(words) if word.lower() in _SMALL]
        if small and len(words) > 3:
            del words[random.choice(small)]
            text = " ".join(words)
    return text


_BEFORE = (
    *("Please ", "Hey, ", "Hi! ", "So, ", "Now ", "And ", "OK, ", "Well, ", "Quick question: "),
    *("I wonder: ", "Tell me, ", "Once more: ", "Excuse me, ", "Next question: "),
    *("In plain words, ",),
)
_AFTER = (
    *(", please.", ", please?", "? Thank you.", " here?", " exactly?", " again?"),
    *(", in short?", "??"),
)
_SMALL = {
    *("a", "an", "the", "is", "are", "do", "does", "can", "i", "me", "you", "to", "of", "in"),
    *("please", "it", "there"),
}
