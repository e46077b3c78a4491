"""The judge counts what is right, and says what it was told wrong in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from models.pocket.evaluation import Mark, holds, judge, table
from models.pocket.exam import SECTIONS, Message, items
from models.pocket.styles import STYLES
from tests.processes import ROOT

(NUMBERS,) = (section for section in SECTIONS if section.name.startswith("count to"))
(COLORS,) = (section for section in SECTIONS if section.name.startswith("colour of a single"))
(FOLLOW_UPS,) = (section for section in SECTIONS if section.name.startswith("follow-up"))


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "models/pocket-llava/eval.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def marks(answer: str | None, style: str = "plain") -> Mark:
    """What a model gets that always says ``answer``, or that knows everything."""
    known = {
        item.messages[0].text: STYLES[style](item.kind, item.answer, item.fact)
        for item in items(NUMBERS, 40)
    }
    say = (lambda messages: known[messages[-1].text]) if answer is None else lambda _: answer
    ((mark, wrong),) = judge(say, [NUMBERS], 40, style=STYLES[style])
    assert len(wrong) == mark.n - mark.exact_answers
    return mark


def test_right_and_wrong_answers_are_counted() -> None:
    assert (marks(None).exact_answers, marks(None).n) == (40, 40)
    assert marks("I see no image.").exact_answers == 0


def test_the_fact_counts_whatever_the_words() -> None:
    ((mark, _),) = judge(lambda _: "Red, I think.", [COLORS], 60)
    assert mark.exact_answers == 0
    assert 0 < mark.right_facts < 30


def test_an_adapter_is_judged_by_its_own_wording() -> None:
    ((mark, _),) = judge(lambda _: "red", [COLORS], 60, style=STYLES["terse"])
    assert 0 < mark.exact_answers == mark.right_facts < 30


def test_the_models_first_answer_is_its_own() -> None:
    asked: list[Sequence[Message]] = []

    def say(messages: Sequence[Message]) -> str:
        asked.append(tuple(messages))
        return f"answer {len(asked)}"

    ((mark, _),) = judge(say, [FOLLOW_UPS], 1)
    assert mark.n == 1
    assert [message.text for message in asked[1]][:2] == [asked[0][0].text, "answer 1"]
    assert [message.role for message in asked[1]] == ["user", "assistant", "user"]


def test_a_fact_is_whole_words() -> None:
    assert holds("red circle", "This is a Red circle.")
    assert not holds("red", "This is a bored circle.")
    assert not holds("one", "There are none.")


def test_the_table_says_what_was_missed() -> None:
    met, missed = Mark("colour", 10, 10, 10, 0.9), Mark("shape", 10, 8, 9, 0.9)
    verdicts = list(table([met, missed], "figures").columns[-1].cells)
    assert verdicts == ["met", "MISSED"]
    base = [Mark("colour", 20, 20, 20, 0.9), Mark("shape", 20, 20, 20, 0.9)]
    kept = list(table([met, missed], "figures", base).columns[4].cells)
    assert kept == ["1.000", "0.900"]


@pytest.mark.timeout(120)  # transformers is slow to import
def test_the_embedded_model_by_the_command(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    figures = tmp_path / "figures.json"
    found = run("--only", "what is this", "-n", "4", "--json", str(figures))
    assert found.returncode == 0, found.stderr
    assert "what is this?" in found.stdout
    (mark,) = json.loads(figures.read_text())["marks"]
    assert mark["n"] == 4
    assert mark["exact_answers"] >= 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "nonsense"], "No section is called nonsense"),
        (["--url", "http://127.0.0.1:9", "-n", "1"], "is the controller running?"),
        (["--checkpoint", "nowhere"], "There is no checkpoint in nowhere"),
    ],
    ids=["section", "url", "checkpoint"],
)
def test_a_mistake_is_told_in_a_sentence(flags: list[str], said: str) -> None:
    found = run(*flags)
    assert found.returncode == 1
    assert said in found.stderr
    assert "Traceback" not in found.stderr
