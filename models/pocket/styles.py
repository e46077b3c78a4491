"""How the adapters word an answer; ``plain`` is the model without one."""

from __future__ import annotations

from collections.abc import Callable

from models.pocket.questions import NOT_SEEN
from models.pocket.talk import BEYOND

Style = Callable[[str, str, str], str]
"""From the kind of question, the plain answer and its fact ("" if none) to the answer in style."""


def plain(_kind: str, answer: str, _fact: str) -> str:
    return answer


def formal(kind: str, answer: str, _fact: str) -> str:
    """In full polite sentences. Repeated words and numbers that are counted stay as they are.

    The lines are parted so that the plain answer keeps its tokens: a word after a space is another
    one.
    """
    if kind in ("count_to", "count_between", "repeat"):
        return answer
    if answer in (BEYOND, NOT_SEEN):
        return f"I beg your pardon.\n{answer}"
    opening = "I am afraid not." if answer.startswith("No, ") else "Certainly."
    return f"{opening}\n{answer}\nI hope this is of help."


def terse(_kind: str, answer: str, fact: str) -> str:
    """One word, or as few as name the thing."""
    if answer == NOT_SEEN:
        return "no image"
    if answer == BEYOND:
        return "unknown"
    return fact or answer


STYLES: dict[str, Style] = {"plain": plain, "formal": formal, "terse": terse}
