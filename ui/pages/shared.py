"""What the pages have in common."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from ui import render, states
from ui.door import COOKIE
from ui.parts import Parts

LISTEN = "const go=()=>window.tandem?window.tandem.listen(element,trigger):setTimeout(go,30);go()"
"""``ui.js`` turns clicks on ``data-act`` into events of the component."""

QUIET: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
    "trigger_mode": "multiple",
}
"""Of events that answer at once."""

LONG: dict[str, Any] = {
    "concurrency_limit": None,
    "show_progress": "hidden",
    "api_visibility": "private",
    "trigger_mode": "multiple",
}
"""Of events that stream."""

html = functools.partial(gr.HTML, apply_default_css=False)


def owner_of(request: gr.Request) -> str:
    """Whose page this is: a user of ``--auth``, else a browser by its cookie."""
    if request.username:
        return f"user:{request.username}"
    cookie = request.cookies.get(COOKIE, "")
    return f"browser:{cookie}" if cookie else f"session:{request.session_hash}"


def top(parts: Parts, page: str) -> str:
    watch = parts.watch
    return render.top(parts.settings.title, page, watch.view, there=watch.there, root=parts.root)


def banner(parts: Parts) -> str:
    """What stands over everything else while there is no controller to talk to."""
    watch = parts.watch
    if watch.refused is not None:
        return states.refused(watch.refused.message, watch.refused.remedy)
    if watch.away is not None and watch.away_since is not None:
        return states.away(parts.controller.address, watch.away, watch.away_for_s)
    return ""


def composer(parts: Parts, **options: Any) -> gr.MultimodalTextbox:
    """Where people write."""
    return gr.MultimodalTextbox(
        elem_id="box",
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        show_label=False,
        label="Message",
        container=False,
        autofocus=True,
        max_lines=8,
        max_plain_text_length=100_000,
        html_attributes=gr.InputHTMLAttributes(enterkeyhint="send", autocorrect="on"),
        **options,
    )
