"""What people and models write becomes HTML: marked up, and never more than text."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from protocol import errors
from protocol.messages import Capabilities
from ui import markdown, render, states
from ui.client import ClusterView, RequestState, WorkerView
from ui.model import Answer, Conversation, Failure, Figures, Image, Listed, Settings, Turn

EVIL = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> ${alert(3)} {{alert(4)}} `${a}` "
    '"><svg/onload=alert(5)> [x](javascript:alert(6)) ![p](http://evil.example/p.png)'
)


def test_markdown_is_marked_up() -> None:
    html = markdown.html("**bold**\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n```python\nx = '<'\n```")
    assert "<strong>bold</strong>" in html
    assert '<td style="text-align:right">2</td>' in html
    assert 'class="c-s1"' in html
    assert "&lt;" in html


def test_html_of_a_model_is_text_and_its_images_are_not_loaded() -> None:
    html = markdown.html(EVIL)
    assert "<img" not in html
    assert "<script" not in html
    assert "<svg/" not in html
    assert 'href="javascript' not in html
    assert "evil.example" not in html


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("so $x^2$ is", ["x^2"]),
        (r"so \(x^2\) is", ["x^2"]),
        ("$$\na\n- b\n$$", ["a\n- b"]),
        (r"\[ \frac{1}{2} \]", [r"\frac{1}{2}"]),
        ("it costs $5 and $10", []),
        ("`$x$` and\n\n```\n$y$\n```", []),
        (r"a \$ b $x$", ["x"]),
        ("$ a$", []),
    ],
)
def test_formulas(text: str, formulas: list[str]) -> None:
    html = markdown.html(text)
    assert html.count("<x-tex") == len(formulas)
    for formula in formulas:
        assert f'tex="{formula}"' in html


TEXTS = {
    "paragraphs": "one\n\ntwo\n\nthree **x",
    "code": "one\n\n```python\na\n\nb\n```\n\nafter\n\nlast",
    "open code": "one\n\n```\na\n\nb",
    "list": "one\n\n- a\n\n- b\n\n  more\n\ntwo",
    "formula": "one\n\n$$\na\n\n$$\n\ntwo",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_growing_text_looks_as_it_will_when_complete(text: str) -> None:
    for end in range(len(text) + 1):
        shown = markdown.growing(text[:end])
        assert shown.replace("\n", "") == markdown.html(text[:end]).replace("\n", "")


def test_only_the_tail_of_a_long_text_is_rendered_again() -> None:
    done, tail = markdown.split("word word\n\n" * 1000 + "the end")
    assert len(tail) < 30
    assert len(done) > 10_000


# ---------------------------------------------------------------- the transcript


def answer(**fields: object) -> Answer:
    made = Answer(1, Settings(model="m"), text="An answer", token_ids=[1, 2], status="stop")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def shown(*answers: Answer, text: str = "A question", view: ClusterView | None = None) -> str:
    image = Image("ab" * 32, 'a"><img>.png', 10, 20)
    turn = Turn(1, text, [image], list(answers), len(answers) - 1)
    return render.transcript(Conversation("c", "t", [turn]), view, root="/chat", writing=False)


def test_a_transcript_escapes_everything() -> None:
    figures = Figures(ttft_s=0.21, tokens_per_s=78.4, completion_tokens=1, prompt_tokens=100,
                      cached_tokens=68)  # fmt: skip
    html = shown(
        answer(text=EVIL, comment=EVIL, worker_id=EVIL, kind=EVIL, figures=figures), text=EVIL
    )
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "<svg/" not in html
    assert '"><img>.png' not in html
    assert "<b>78</b> tok/s" in html
    assert "68 % cached" in html
    assert ">1 token<" in html
    assert 'src="/chat/tandem/media/' in html


@pytest.mark.parametrize("code", sorted(errors.ERRORS))
def test_every_error_is_a_state_with_a_remedy_and_a_way_on(code: str) -> None:
    error = errors.ERRORS[code]("What happened.", retry_after_s=7.2)
    for partial in ("", "partial"):
        broken = answer(
            text=partial, token_ids=[1] * len(partial), status="failed", failure=Failure.of(error)
        )
        state = states.of_answer(broken, None, alive=False)
        assert state is not None
        assert "What happened." in state.sentence
        assert len(state.sentence) > len("What happened.") + 10, "a remedy"
        assert state.buttons
        assert "wrong" not in state.title.lower(), "no generic apology"


def test_a_full_queue_says_when_to_come_back() -> None:
    failure = Failure(code="overloaded", message="64 requests wait.", retry_after_s=7.2)
    html = shown(answer(text="", status="failed", failure=failure))
    assert "64 requests wait." in html
    assert "in 8 s" in html
    assert 'data-wait="8"' in html


def worker(worker_id: str, **fields: object) -> WorkerView:
    given = {"model_names": ["m"], "kind": "hf", "capabilities": Capabilities(resume=True)}
    return WorkerView.model_validate(given | {"worker_id": worker_id} | fields)


def test_a_lost_worker_names_who_can_go_on() -> None:
    lost = answer(
        status="failed", worker_id="hf-1", failure=Failure(code="upstream_lost", message="Gone.")
    )
    others = (
        worker("hf-1"),
        worker("hf-2"),
        worker("hf-3", state="draining"),
        worker("hf-4", model_names=["other"]),
        worker("hf-5", capabilities=Capabilities()),
    )
    assert states.resuming(lost, ClusterView(workers=others)) == ["hf-2"]
    html = shown(lost, view=ClusterView(workers=others))
    assert "Worker hf-1 was lost in mid-answer" in html
    assert "hf-2 can go on at the exact token" in html
    assert "no other worker can go on right now" in shown(lost, view=ClusterView())


def test_an_answer_without_a_writer_was_cut_off() -> None:
    cut = answer(status="running")
    assert "The chat page was restarted" in shown(cut)
    assert states.of_answer(cut, None, alive=True) is None


def test_the_place_in_the_queue() -> None:
    third = RequestState(state="waiting", place=3, waiting=5)
    assert "2 requests before you" in states.waiting(third, None, 1.0)
    assert "You are next" in states.waiting(third.model_copy(update={"place": 1}), None, 1.0)
    reading = RequestState(state="running", worker_id="hf-1")
    assert "hf-1 is reading" in states.waiting(reading, None, 5.0)


def test_chats_are_grouped_by_day() -> None:
    now = datetime(2026, 5, 10, 12).astimezone()
    ages = {"a": 1, "b": 24, "c": 24 * 4, "d": 24 * 30}
    listed = [
        Listed(name, f"<{name}>", (now - timedelta(hours=hours)).timestamp())
        for name, hours in ages.items()
    ]
    html = render.conversations(listed, "b", now)
    for group in ("Today", "Yesterday", "Last 7 days", "Older"):
        assert f'<div class="g">{group}</div>' in html
    assert "&lt;a&gt;" in html
    assert html.count("aria-current") == 2
