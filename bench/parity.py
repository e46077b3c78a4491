"""Truth before speed: fixed greedy questions to every target, and how many answers are the same.

Two answers are equal if their token ids are, or their texts where a server does not tell ids. An
answer is exact if it is the right one letter for letter, and right if it holds what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from bench.wire import Ask, Reply

QUESTIONS = 50
AT_ONCE = 4
_EXAMPLES = 5
_SHOWN = 4

Asked = Sequence[tuple[str, Ask]]
Answers = Mapping[str, Sequence[Reply]]


def equal(one: Reply, other: Reply) -> bool:
    """Whether two answers are the same; what was not answered equals nothing."""
    if not (one.answered and other.answered):
        return False
    if one.token_ids and other.token_ids:
        return one.token_ids == other.token_ids
    return one.text.strip() == other.text.strip()


def is_exact(ask: Ask, reply: Reply) -> bool:
    return reply.answered and reply.text.strip() == ask.answer


def is_right(ask: Ask, reply: Reply) -> bool:
    """Whether the answer holds the fact that was asked for; the whole of it where there is none."""
    if is_exact(ask, reply):
        return True
    return reply.answered and bool(ask.fact) and ask.fact.lower() in reply.text.lower()


def compared(asked: Asked, answers: Answers) -> dict[str, Any]:
    """The figures of each target, and of each pair of targets.

    The reference is the first one: ``equal`` are a target's answers that are the same as its.
    """
    names = list(answers)
    reference = answers[names[0]]
    return {
        "questions": len(asked),
        "reference": names[0],
        "targets": {name: _figures(asked, reference, answers[name]) for name in names},
        "pairs": {
            f"{one} / {other}": sum(map(equal, answers[one], answers[other]))
            for one, other in combinations(names, 2)
        },
        "different": _differences(asked, answers),
        "shown": _shown(asked, answers),
    }


def _figures(asked: Asked, reference: Sequence[Reply], replies: Sequence[Reply]) -> dict[str, Any]:
    asks = [ask for _, ask in asked]
    codes = sorted({reply.code for reply in replies if not reply.answered})
    number = len(asked)
    return {
        "answered": sum(reply.answered for reply in replies),
        "equal": sum(map(equal, reference, replies)) / number,
        "exact": sum(map(is_exact, asks, replies)) / number,
        "right": sum(map(is_right, asks, replies)) / number,
        "not_answered": codes,
    }


def _differences(asked: Asked, answers: Answers) -> list[dict[str, Any]]:
    """Some questions whose answers are not all the same."""
    found = []
    for index, (sort, ask) in enumerate(asked):
        given = {name: replies[index] for name, replies in answers.items()}
        first = next(iter(given.values()))
        if not all(equal(first, reply) for reply in given.values()):
            texts = {name: _words(reply) for name, reply in given.items()}
            found.append({"sort": sort, "question": _question(ask), "answers": texts})
    return found[:_EXAMPLES]


def _shown(asked: Asked, answers: Answers) -> list[dict[str, Any]]:
    """Some questions about pictures with all answers, for people to see."""
    return [
        {
            "question": _question(ask),
            "image": ask.images[0],
            "right": ask.answer,
            "answers": {name: _words(replies[index]) for name, replies in answers.items()},
        }
        for index, (_, ask) in enumerate(asked)
        if ask.images
    ][:_SHOWN]


def _question(ask: Ask) -> str:
    return ask.messages[-1][1].replace("<image>", "")


def _words(reply: Reply) -> str:
    return reply.text.strip()[:300] if reply.answered else f"({reply.end}: {reply.code})"
