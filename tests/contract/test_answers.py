"""What the embedded model says is right, and both kinds of worker say it, through a controller."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.contract.conftest import REAL_KINDS, START_TIMEOUT_S
from tests.pictures import Puzzle, puzzles
from tests.streams import Answer, ask

pytestmark = pytest.mark.timeout(2 * START_TIMEOUT_S + 120)

PUZZLES = 100


@pytest.fixture(scope="module")
def answers(controller: str) -> dict[str, list[tuple[Puzzle, Answer]]]:
    """The same puzzles asked of each kind, four at a time."""

    def solve(kind: str) -> list[tuple[Puzzle, Answer]]:
        def one(puzzle: Puzzle) -> Answer:
            asked = {"model": "pocket-llava", "kind": kind, "temperature": 0, **puzzle.fields}
            return ask(controller, **asked, max_new_tokens=160)

        asked = puzzles(PUZZLES)
        with ThreadPoolExecutor(4) as pool:
            return list(zip(asked, pool.map(one, asked), strict=True))

    return {kind: solve(kind) for kind in REAL_KINDS}


def test_both_kinds_say_the_same(answers: dict[str, list[tuple[Puzzle, Answer]]]) -> None:
    for (puzzle, hf), (_, sglang) in zip(answers["hf"], answers["sglang"], strict=True):
        assert hf.token_ids == sglang.token_ids, (puzzle.section, hf.text, sglang.text)
        assert hf.text == sglang.text
        assert hf.finished.reason == sglang.finished.reason == "stop", (puzzle.section, hf.text)


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_what_they_say_is_true(answers: dict[str, list[tuple[Puzzle, Answer]]], kind: str) -> None:
    wrong = [
        (puzzle.section, puzzle.answer, answer.text)
        for puzzle, answer in answers[kind]
        if answer.text != puzzle.answer
    ]
    assert len(wrong) <= PUZZLES // 10, wrong
