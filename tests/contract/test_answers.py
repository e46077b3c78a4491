"""What the embedded model says is right, and both kinds of worker say it, through a controller."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.contract.conftest import START_TIMEOUT_S, Workers
from tests.pictures import Puzzle, puzzles
from tests.processes import running
from tests.streams import Answer, ask

pytestmark = pytest.mark.timeout(2 * START_TIMEOUT_S + 120)

KINDS = ("hf", "sglang")
PUZZLES = 100


@pytest.fixture(scope="module")
def controller(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A controller in front of one worker of each kind."""
    log = tmp_path_factory.mktemp("controller")
    with running(log, "controller", "--port", "0") as process:
        address = process.wait_ready()
        for kind in KINDS:
            # They beat at no controller, so this one is told not to wait for it.
            registration = {"worker_name": workers[kind].address, "check_heart_beat": False}
            httpx.post(f"{address}/register_worker", json=registration).raise_for_status()
        yield address


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

    return {kind: solve(kind) for kind in KINDS}


def test_both_kinds_say_the_same(answers: dict[str, list[tuple[Puzzle, Answer]]]) -> None:
    for (puzzle, hf), (_, sglang) in zip(answers["hf"], answers["sglang"], strict=True):
        assert hf.token_ids == sglang.token_ids, (puzzle.section, hf.text, sglang.text)
        assert hf.text == sglang.text
        assert hf.finished.reason == sglang.finished.reason == "stop", (puzzle.section, hf.text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_they_say_is_true(answers: dict[str, list[tuple[Puzzle, Answer]]], kind: str) -> None:
    wrong = [
        (puzzle.section, puzzle.answer, answer.text)
        for puzzle, answer in answers[kind]
        if answer.text != puzzle.answer
    ]
    assert len(wrong) <= PUZZLES // 10, wrong
