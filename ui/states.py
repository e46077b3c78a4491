"""What the page says when an answer is not simply there: what happened, what was kept, what next.

Sentences come from the typed errors; a state without a remedy does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil

from protocol.messages import WorkerState
from ui.client import ClusterView, RequestState
from ui.icons import ICONS
from ui.model import Answer, Failure

Button = tuple[str, str]
"""What it does (``data-act``) and what it says; the first of a card is the one to press."""

CONTINUE: Button = ("continue", "Continue")
RETRY: Button = ("retry", "Try again")
AGAIN: Button = ("retry", "Start over")
NEW: Button = ("new", "New chat")

_LOST = ("upstream_lost", "engine_failed", "draining", "out_of_memory")


@dataclass(frozen=True, slots=True)
class State:
    """One card."""

    name: str  # for tests and styles
    icon: str
    tone: str  # bad: something broke; later: not now
    title: str
    sentence: str
    buttons: Sequence[Button] = ()
    wait_s: float | None = None  # the first button counts down from here
    request_id: str = ""


def of_answer(answer: Answer, view: ClusterView | None, *, alive: bool) -> State | None:
    """The card under an answer; ``None`` when it needs none.

    ``alive`` says whether a job still writes it: one that is "running" without a job was cut off
    by a restart of this page.
    """
    if answer.status == "running" and not alive:
        return State(
            "interrupted",
            "plug",
            "bad",
            "The chat page was restarted",
            "What had arrived is above. "
            + ("Continue picks up at the exact token." if answer.token_ids else "Ask again."),
            _continue_or_retry(answer),
            request_id=answer.request_id,
        )
    if answer.status == "length" and answer.token_ids:
        return State(
            "length",
            "clock",
            "later",
            f"The answer stopped at {len(answer.token_ids)} tokens",
            "That is the limit of one answer, or the end of what the model can hold. The limit is "
            "in the settings.",
            (CONTINUE,),
        )
    if answer.failure is None:
        return None
    return _of_failure(answer, answer.failure, view)


def _of_failure(answer: Answer, failure: Failure, view: ClusterView | None) -> State:
    name, said = failure.code, _said(failure)
    icon, tone, buttons = "warn", "bad", [RETRY]
    wait_s = failure.retry_after_s
    if name in _LOST and answer.token_ids:
        who = f"Worker {answer.worker_id}" if answer.worker_id else "The worker"
        title = f"{who} was lost in mid-answer"
        said = f"{failure.message} {_goes_on(answer, view)}"
        icon, buttons = "plug", [CONTINUE, AGAIN]
    elif name in _LOST:
        title = "No worker could take this question"
        icon = "plug"
    elif name == "away":
        title = "The controller was lost" if answer.text else "The controller cannot be reached"
        said = (
            f"The page asked it and {failure.message}. Your question is kept; the page reconnects "
            "by itself."
        )
        icon, buttons = "plug", list(_continue_or_retry(answer))
    elif name in ("overloaded", "rate_limited"):
        title = "The queue is full" if name == "overloaded" else "Too many questions at once"
        icon, tone = "clock", "later"
        if wait_s is not None:
            said = f"{failure.message} Your question is kept; it can be sent in {ceil(wait_s)} s."
    elif name == "no_replica":
        title = "No worker serves this model right now"
        icon, tone = "clock", "later"
        said = f"{said} {_loading(view)}".strip()
    elif name in ("model_not_found", "adapter_not_found"):
        title = "This model is not served" if name.startswith("model") else "No such adapter here"
        said = f"{failure.message} Choose another one above, then try again."
    elif name == "context_overflow":
        title = "This conversation is too long for the model"
        said = f"{failure.message} Start a new chat, or edit an earlier question and drop images."
        buttons = [NEW]
    elif name in ("too_large", "bad_image"):
        title = "An image was refused" if name == "bad_image" else "This is too large"
        icon, buttons = "image", [("undo", "Take it back")]
    elif name == "unsupported":
        title = "No worker can do this"
        said = f"{failure.message} Choose Auto or another model above, then try again."
    elif name in ("unauthenticated", "forbidden"):
        title = "The controller asks for a key"
        said = f"{failure.message} Whoever runs this page gives it one with TANDEM_API_KEY."
    elif name == "deadline_exceeded":
        title = "The answer took too long"
        buttons = list(_continue_or_retry(answer))
    else:
        title = "The question was refused" if name == "invalid_request" else "No answer came"
    if answer.token_ids and buttons == [RETRY]:
        buttons = [CONTINUE, AGAIN]
    return State(
        name, icon, tone, title, said, tuple(buttons), wait_s=wait_s, request_id=answer.request_id
    )


def _said(failure: Failure) -> str:
    return f"{failure.message.rstrip('.')}. {failure.remedy}".strip()


def _continue_or_retry(answer: Answer) -> tuple[Button, ...]:
    return (CONTINUE, AGAIN) if answer.token_ids else (RETRY,)


def _goes_on(answer: Answer, view: ClusterView | None) -> str:
    kept = f"The {len(answer.token_ids)} tokens above are kept"
    able = resuming(answer, view)
    if not able:
        return f"{kept}; no other worker can go on right now, so try Continue in a moment."
    names = " or ".join(able[:3])
    return f"{kept}, and {names} can go on at the exact token."


def resuming(answer: Answer, view: ClusterView | None) -> list[str]:
    """The ready workers that can continue this answer, of whichever kind."""
    if view is None:
        return []
    return [
        worker.worker_id
        for worker in view.ready
        if worker.worker_id != answer.worker_id
        and answer.settings.model in worker.bases
        and worker.capabilities.resume
        and answer.settings.adapter in (None, *worker.adapters)
    ]


def _loading(view: ClusterView | None) -> str:
    starting = [w for w in (view.workers if view else ()) if w.state == WorkerState.STARTING]
    return " ".join(f"{w.worker_id} is {w.progress or 'starting'}." for w in starting[:2])


# ---------------------------------------------------------------- the cards' HTML


def card(state: State, index: int | None = None) -> str:
    """The HTML of a card; ``index`` is the turn its buttons are about."""
    at = "" if index is None else f' data-i="{index}"'
    buttons = []
    for number, (act, label) in enumerate(state.buttons):
        pressed_first = number == 0
        wait = ""
        if pressed_first and state.wait_s:
            wait = f' data-wait="{ceil(state.wait_s)}"'
        buttons.append(
            f'<button type="button" class="bt{" pri" if pressed_first else ""}" '
            f'data-act="{act}"{at}{wait}>{escape(label)}</button>'
        )
    row = f'<div class="row">{"".join(buttons)}</div>' if buttons else ""
    details = (
        f"<details><summary>Details</summary>Request {escape(state.request_id)}, "
        f"{escape(state.name)}</details>"
        if state.request_id
        else ""
    )
    return (
        f'<div class="card {state.tone}" role="status" data-state="{escape(state.name)}">'
        f"{ICONS[state.icon]}<div><b>{escape(state.title)}</b><span>{escape(state.sentence)}</span>"
        f"{row}{details}</div></div>"
    )


def waiting(place: RequestState | None, view: ClusterView | None, waited_s: float) -> str:
    """What stands where the answer will be, before its first token."""
    if place is not None and place.state == "waiting":
        ahead = max(0, (place.place or 1) - 1)
        number = "You are next" if not ahead else f"{ahead} request{'s' * (ahead > 1)} before you"
        share = 100 * (1 - ahead / max(place.waiting or 0, ahead + 1))
        return (
            f'<div class="wait" data-state="queued">{ICONS["clock"]}<div><b>Waiting for a free '
            f"slot</b><span>{number}; {waited_s:.0f} s so far. Stop takes the question back."
            f'</span><div class="bar2"><i style="width:{max(4, share):.0f}%"></i></div></div></div>'
        )
    slow = waited_s > 3
    note = _loading(view) if slow else ""
    if slow and not note and place is not None and place.worker_id:
        note = f"{place.worker_id} is reading the question: {waited_s:.0f} s so far."
    said = f'<span class="note">{escape(note)}</span>' if note else ""
    return (
        '<div class="wait" data-state="reading"><div class="dots" aria-hidden="true"><i></i><i></i>'
        f'<i></i></div><span class="sr">Waiting for the first token.</span>{said}</div>'
    )


def away(address: str, reason: str, since_s: float) -> str:
    """The banner while the controller does not answer."""
    return card(
        State(
            "controller-away",
            "plug",
            "later",
            "The controller is away",
            f"{address}: {reason}. This page asks again every 2 seconds and reconnects by itself"
            f" ({since_s:.0f} s so far). Your chats stay readable.",
        )
    )


def refused(message: str, remedy: str) -> str:
    """The banner while the controller refuses this page itself."""
    return card(
        State(
            "refused",
            "warn",
            "bad",
            "The controller refuses this page",
            f"{message} {remedy} This page is given a key with TANDEM_API_KEY.",
        )
    )


def too_large(name: str, size: int, limit: int) -> str:
    """An image that is larger than what is sent."""
    return card(
        State(
            "too-large",
            "image",
            "later",
            f"“{name}” is {megabytes(size)}; the limit is {megabytes(limit)}",
            "Models look at far fewer pixels, so a smaller copy loses nothing they would see. "
            "Your message is kept.",
            (("shrink", "Shrink and send"), ("dismiss", "Remove it")),
        )
    )


def not_sent(title: str, sentence: str) -> str:
    """A message that was not sent, and why."""
    return card(State("not-sent", "image", "later", title, sentence, (("dismiss", "All right"),)))


def megabytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MB" if size >= 100_000 else f"{size / 1024:.0f} kB"
