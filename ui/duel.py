"""Two answers to one question, side by side, as HTML."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from ui import markdown, states
from ui.jobs import Job
from ui.render import KINDS, kind_badge

LOWER_IS_BETTER = {"ttft": True, "speed": False, "total": True}


@dataclass(slots=True)
class Side:
    job: Job

    @property
    def ttft_s(self) -> float | None:
        return self.job.ttft_s

    @property
    def figures(self) -> dict[str, float | None]:
        """First token, speed, total, tokens: as they are by now."""
        job = self.job
        return {
            "ttft": job.ttft_s,
            "speed": job.tokens_per_s,
            "total": job.total_s,
            "tokens": float(len(job.answer.token_ids)) if job.started else None,
        }

    def told(self) -> dict[str, Any]:
        """What a vote remembers of it."""
        answer = self.job.answer
        return {
            "answer": answer.text,
            "kind": answer.kind,
            "worker_id": answer.worker_id,
            "request_id": answer.request_id,
            "settings": answer.settings.model_dump(),
            "figures": answer.figures.model_dump(exclude_none=True),
        }


@dataclass(slots=True)
class Duel:
    question: str
    images: list[str]
    sides: list[Side]
    blind: bool
    choice: str | None = None
    names: tuple[str, str] = field(default=("A", "B"))

    @property
    def ended(self) -> bool:
        return all(side.job.ended for side in self.sides)

    @property
    def hidden(self) -> bool:
        """Whether the names are still a secret."""
        return self.blind and self.choice is None

    @property
    def votable(self) -> bool:
        """Whether there are two answers, and no vote yet."""
        good = all(side.job.answer.status in ("stop", "length") for side in self.sides)
        return self.ended and self.choice is None and good


def empty(served: bool) -> str:
    """Before the first question."""
    said = (
        "Choose A and B above, then ask. Both answers come at once, with their time to the first "
        "token and their speed. Blind hides who is who until you vote."
        if served
        else "No model is being served yet. This page looks every two seconds and opens by itself."
    )
    return f'<section class="hero duel"><h1>One question, two answers</h1><p>{said}</p></section>'


def body(duel: Duel, root: str) -> str:
    """Question, race and panes."""
    images = "".join(
        f'<img src="{root}/tandem/media/{sha256}" alt="Attached image">' for sha256 in duel.images
    )
    text = f"<span>{escape(duel.question)}</span>" if duel.question else ""
    a, b = (side.figures for side in duel.sides)
    better = (_better(a, b), _better(b, a)) if duel.ended else (set(), set())
    panes = "".join(
        _pane(duel, name, side, won)
        for name, side, won in zip(duel.names, duel.sides, better, strict=True)
    )
    thanks = ""
    if duel.choice is not None:
        said = {"a": "A is better", "b": "B is better", "tie": "a tie", "both_bad": "both bad"}
        thanks = f'<p class="thanks" role="status">Your vote is kept: {said[duel.choice]}.</p>'
    return (
        f'<div class="ask">{images}{text}</div>{_race(duel)}'
        f'<div class="cols" tabindex="0">{panes}</div>{thanks}'
    )


def _better(mine: dict[str, float | None], other: dict[str, float | None]) -> set[str]:
    """The figures in which this side won."""
    won = set()
    for name, lower in LOWER_IS_BETTER.items():
        here, there = mine[name], other[name]
        if here is not None and there is not None and here != there and (here < there) == lower:
            won.add(name)
    return won


def _race(duel: Duel) -> str:
    longest = max(*(side.job.total_s for side in duel.sides), 0.1)
    rows, told = [], []
    for name, side, colour in zip(duel.names, duel.sides, _colours(duel), strict=True):
        total = side.job.total_s
        first = total if side.ttft_s is None else side.ttft_s
        begun, length = 100 * first / longest, 100 * max(0.0, total - first) / longest
        kind = side.job.answer.kind or ""
        said = name if duel.hidden or not kind else f"{name} · {KINDS.get(kind, kind)}"
        told.append(f"{name} {total:.1f} s")
        rows.append(
            f'<span>{escape(said)}</span><div class="tk {colour}">'
            f'<i class="w" style="width:{begun:.1f}%"></i>'
            f'<i class="g" style="left:{begun:.1f}%;width:{length:.1f}%"></i></div>'
            f"<span>{total:.1f} s</span>"
        )
    return (
        f'<div class="race" role="img" aria-label="Time: {", ".join(told)}">{"".join(rows)}</div>'
    )


def _colours(duel: Duel) -> str:
    """Each kind in the colour of its badge, where that tells them apart and is no secret."""
    kinds = [side.job.answer.kind for side in duel.sides]
    return "hs" if kinds == ["hf", "sglang"] and not duel.hidden else "sh"


def _pane(duel: Duel, name: str, side: Side, won: set[str]) -> str:
    job, figures = side.job, side.figures
    answer, settings = job.answer, job.answer.settings
    if duel.hidden:
        head = f"<b>Answer {name}</b>"
    else:
        who = escape(" · ".join(part for part in (settings.model, settings.adapter) if part))
        head = f"<b>{name}</b>{kind_badge(answer.kind)}{who}"
        head += f'<span class="wid">{escape(answer.worker_id or "")}</span>'
    cells = "".join(
        f"<div{' class=win' if key in won else ''}><span>{label}</span>"
        f"<b>{_said(figures[key], form)}<small>{unit}</small></b></div>"
        for key, label, form, unit in (
            ("ttft", "First token", ".2f", "s"),
            ("speed", "Speed", ".0f", "tok/s"),
            ("total", "Total", ".1f", "s"),
            ("tokens", "Tokens", ".0f", ""),
        )
    )
    state = states.of_answer(answer, None, alive=not job.ended) if job.ended else None
    card = states.card(replace(state, buttons=())) if state else ""
    if answer.status == "stopped":
        card = '<p class="tag">Stopped by you</p>'
    text = job.text
    if text:
        shown = markdown.growing(text) if not job.ended else markdown.html(text)
    else:
        shown = "" if job.ended else states.waiting(job.place, None, job.waited_s)
    return (
        f'<section class="pane" data-testid="pane-{name.lower()}" aria-label="Answer {name}" '
        f'aria-busy="{"false" if job.ended else "true"}"><header>{head}</header>'
        f'<div class="kp">{cells}</div><div class="md{"" if job.ended or not text else " cur"}">'
        f"{shown}</div>{card}</section>"
    )


def _said(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
