"""The transcript, the list and the top of the page as HTML. All text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape

from ui import markdown, states
from ui.client import ClusterView
from ui.icons import ICONS
from ui.jobs import Job
from ui.model import Answer, Conversation, Listed, Turn

KINDS = {"sglang": "SGLang", "hf": "HF", "echo": "Echo"}


def kind_badge(kind: str | None) -> str:
    if not kind:
        return ""
    look = kind if kind in KINDS else "other"
    return f'<span class="bk bk-{look}">{escape(KINDS.get(kind, kind))}</span>'


def _button(act: str, icon: str, label: str, index: int, look: str = "", **data: object) -> str:
    fields = "".join(f' data-{name}="{escape(str(value))}"' for name, value in data.items())
    pressed = f' aria-pressed="{"true" if "on" in look else "false"}"' if act == "judge" else ""
    return (
        f'<button type="button" class="ib {look}" data-act="{act}" data-i="{index}"{fields}'
        f'{pressed} aria-label="{label}" title="{label}">{ICONS[icon]}</button>'
    )


# ---------------------------------------------------------------- turns


def transcript(
    conversation: Conversation | None, view: ClusterView | None, *, root: str, writing: bool
) -> str:
    """All turns; ``writing`` says that the last answer is shown live, below."""
    turns = conversation.turns if conversation else []
    name = escape(conversation.id) if conversation else ""
    inner = []
    for index, turn in enumerate(turns):
        last = index == len(turns) - 1
        inner.append(_question(index, turn, root))
        answer = turn.answer
        if answer is not None and not (last and writing):
            inner.append(_answered(index, turn, answer, view, last=last))
    # The list of turns, so that a fresh page can tell one conversation from another.
    return (
        f'<div role="log" aria-live="off" aria-label="Conversation" data-c="{name}">'
        f"{''.join(inner)}</div>"
    )


def _question(index: int, turn: Turn, root: str) -> str:
    images = "".join(
        f'<a class="im" href="{root}/tandem/media/{image.sha256}" target="_blank" rel="noopener">'
        f'<img src="{root}/tandem/media/{image.sha256}" alt="Attached image: {escape(image.name)}" '
        f'width="{image.width}" height="{image.height}" loading="lazy"></a>'
        for image in turn.images
    )
    shown = f'<div class="ims n{min(4, len(turn.images))}">{images}</div>' if images else ""
    text = f'<div class="ub">{escape(turn.text)}</div>' if turn.text else ""
    return (
        f'<article class="turn user" data-testid="user-turn" data-raw="{escape(turn.text)}" '
        f'aria-label="You">{shown}{text}<div class="acts">'
        + _button("edit", "edit", "Edit message", index)
        + _button("copy", "copy", "Copy message", index)
        + "</div></article>"
    )


def _answered(
    index: int, turn: Turn, answer: Answer, view: ClusterView | None, *, last: bool
) -> str:
    number = len(turn.answers)
    branch = ""
    if number > 1:
        at = turn.current
        branch = (
            '<span class="br">'
            + _button("branch", "left", "Previous answer", index, "sm", to=max(0, at - 1))
            + f"<span>{at + 1}/{number}</span>"
            + _button("branch", "right", "Next answer", index, "sm", to=min(number - 1, at + 1))
            + "</span>"
        )
    state = states.of_answer(answer, view, alive=False)
    note = states.card(state, index) if state else ""
    if answer.status == "stopped":
        more = (
            f'<button type="button" class="lk" data-act="continue" data-i="{index}">Continue'
            "</button>"
            if answer.token_ids
            else ""
        )
        note = (
            f'<p class="tag" data-state="stopped">Stopped by you{" · " if more else ""}{more}</p>'
        )
    liked, disliked = answer.vote == "up", answer.vote == "down"
    later = "" if last else "1"
    acts = _button("copy", "copy", "Copy answer", index) if answer.text else ""
    acts += _button("retry", "retry", "Answer again", index, later=later)
    if answer.text:
        acts += _button("judge", "up", "Good answer", index, "on" if liked else "", v="up")
        acts += _button("judge", "down", "Bad answer", index, "on" if disliked else "", v="down")
    if last:
        acts += _button("undo", "undo", "Take the last question back", index)
    comment = (
        f'<p class="tag comment">Your comment: {escape(answer.comment)}</p>'
        if answer.comment
        else ""
    )
    body = f'<div class="md">{markdown.html(answer.text)}</div>' if answer.text else ""
    return (
        f'<article class="turn bot" data-testid="bot-turn" data-i="{index}" '
        f'data-raw="{escape(answer.text)}" aria-label="{escape(answer.settings.model)}">'
        f'{body}{note}<footer>{branch}<span class="acts">{acts}</span>{figures(answer)}</footer>'
        f"{comment}</article>"
    )


def figures(answer: Answer) -> str:
    """The small line: kind, first token, speed, tokens, cached share, worker."""
    told = answer.figures
    parts = [kind_badge(answer.kind)]
    if answer.settings.adapter:
        parts.append(f'<span class="opt">{escape(answer.settings.adapter)}</span>')
    if told.ttft_s is not None:
        parts.append(f'<span title="Time to the first token">{told.ttft_s:.2f} s</span>')
    if told.tokens_per_s is not None:
        rate = f"{told.tokens_per_s:.0f}"
        parts.append(f'<span title="Tokens per second"><b>{rate}</b> tok/s</span>')
    if told.completion_tokens:
        plural = "s" * (told.completion_tokens != 1)
        parts.append(f"<span>{told.completion_tokens} token{plural}</span>")
    if told.prompt_tokens and told.cached_tokens is not None:
        share = 100 * told.cached_tokens / told.prompt_tokens
        parts.append(
            f'<span class="opt" title="{told.cached_tokens} of {told.prompt_tokens} tokens of the '
            f'question were in the cache">{share:.0f} % cached</span>'
        )
    if answer.worker_id:
        parts.append(f'<span class="opt wid">{escape(answer.worker_id)}</span>')
    dot = '<i aria-hidden="true">·</i>'
    return f'<span class="st" data-testid="stats">{dot.join(part for part in parts if part)}</span>'


def live(job: Job, view: ClusterView | None) -> str:
    """The answer that is being written."""
    answer, text = job.answer, job.text
    if text:
        body = f'<div class="md cur">{markdown.growing(text)}</div>'
    else:
        body = states.waiting(job.place, view, job.waited_s)
    parts = [kind_badge(answer.kind)]
    if answer.worker_id:
        parts.append(f'<span class="wid">{escape(answer.worker_id)}</span>')
    if job.tokens_per_s is not None:
        parts.append(f"<span><b>{job.tokens_per_s:.0f}</b> tok/s</span>")
    dot = '<i aria-hidden="true">·</i>'
    line = dot.join(part for part in parts if part)
    return (
        f'<article class="turn bot live" data-testid="live" aria-busy="true">{body}'
        f'<footer><span class="st">{line}</span></footer></article>'
    )


# ---------------------------------------------------------------- around them


def conversations(listed: Sequence[Listed], current: str | None, now: datetime) -> str:
    """The list, by day."""
    if not listed:
        return '<nav aria-label="Chats"><p class="none">Nothing here yet.</p></nav>'
    out, group = [], ""
    for item in listed:
        named = _day(datetime.fromtimestamp(item.updated_at).astimezone(), now)
        if named != group:
            group = named
            out.append(f'<div class="g">{group}</div>')
        chosen = ' aria-current="true"' if item.id == current else ""
        title = escape(item.title)
        out.append(
            f'<div class="cv" data-k="{escape(item.id)}"{chosen}>'
            f'<button type="button" class="op" data-act="open"{chosen}>{title}</button>'
            f'<button type="button" class="ib sm" data-act="rename" aria-label="Rename {title}">'
            f"{ICONS['edit']}</button>"
            f'<button type="button" class="ib sm" data-act="delete" aria-label="Delete {title}">'
            f"{ICONS['trash']}</button></div>"
        )
    return f'<nav aria-label="Chats">{"".join(out)}</nav>'


def _day(then: datetime, now: datetime) -> str:
    days = (now.date() - then.date()).days
    if days <= 0:
        return "Today"
    return "Yesterday" if days == 1 else "Last 7 days" if days < 8 else "Older"


def top(title: str, page: str, view: ClusterView | None, *, there: bool, root: str) -> str:
    """The bar on top: name, pages, how the cluster is, light or dark."""
    pages = (
        ("chat", "/", "Chat"),
        ("compare", "/compare", "Compare"),
        ("cluster", "/cluster", "Cluster"),
    )
    links = "".join(
        f'<a href="{root}{path}"{" aria-current=page" if name == page else ""}>'
        f"{ICONS[name]}{label}</a>"
        for name, path, label in pages
    )
    ready = len(view.ready) if view else 0
    if not there:
        dot, said = "rd", '<span class="lg">controller away</span>'
    elif ready:
        dot, said = "", f'{ready} <span class="lg">worker{"s" * (ready != 1)} ready</span>'
    else:
        dot, said = "am", '<span class="lg">waiting for workers</span>'
    side = (
        '<button class="ib" type="button" data-side aria-label="Chats" aria-controls="side">'
        f"{ICONS['side']}</button>"
        if page == "chat"
        else ""
    )
    return (
        f'<div class="nv">{side}<a class="brand" href="{root}/" aria-label="{escape(title)}">'
        f"<i></i><span>{escape(title)}</span></a>"
        f'<nav aria-label="Pages">{links}</nav><div class="sp"></div>'
        f'<span class="pill" data-testid="health" role="status"><i class="dot {dot}"></i>'
        f"<span>{said}</span></span>"
        '<button class="ib" type="button" data-theme aria-label="Light or dark">'
        f"{ICONS['sun']}</button></div>"
    )


def exports(conversation: str | None, root: str) -> str:
    """The menu that takes a conversation away as a file."""
    if conversation is None:
        return ""
    at = f"{root}/tandem/export/{escape(conversation)}"
    return (
        '<details class="menu"><summary class="ghost">Export</summary><div>'
        f'<a href="{at}.md" download>Markdown</a><a href="{at}.json" download>JSON</a>'
        "</div></details>"
    )
