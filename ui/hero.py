"""What an empty chat shows: examples, or what is still missing."""

from __future__ import annotations

from html import escape

from ui import markdown
from ui.client import ClusterView
from ui.icons import ICONS

EXAMPLES = {
    "circle": ("Name a shape", "What is this?"),
    "pair": ("Describe a scene", "What do you see?"),
    "three": ("Count things", "How many shapes are there?"),
    "count": ("Watch it stream", "Count from 1 to 20."),
}
"""By name: title and question; those with a picture have it in ui/examples."""

WITHOUT_PICTURE = "count"


def welcome(root: str) -> str:
    """Four questions to begin with."""
    cards = "".join(
        f'<button type="button" class="ex" data-act="example" data-k="{name}">'
        f"{_drawing(name, root)}<span><b>{escape(title)}</b>{escape(question)}</span></button>"
        for name, (title, question) in EXAMPLES.items()
    )
    return (
        '<section class="hero"><h1>What should we look at?</h1><p>Ask a question, paste an image, '
        f'or start from an example.</p><div class="exs">{cards}</div></section>'
    )


def _drawing(name: str, root: str) -> str:
    if name == WITHOUT_PICTURE:
        return '<span class="num" aria-hidden="true">1 2 3 …</span>'
    return f'<img src="{root}/tandem/examples/{name}.png" alt="" width="96" height="72">'


def unserved(view: ClusterView | None, controller: str, *, there: bool) -> str:
    """No model yet: how far things are, and the command that helps."""
    starting = [w for w in (view.workers if view else ()) if w.state == "starting"]
    others = [w for w in (view.workers if view else ()) if w.state == "draining"]
    steps = []
    if there:
        steps.append(("done", "Controller", f"answers at {controller}", ""))
    else:
        steps.append(("cur", "Controller", f"does not answer at {controller} yet", ""))
    command = markdown.code(
        f"python -m workers.hf --model-path models/pocket-llava --controller-address {controller}",
        "bash",
    )
    if starting:
        told = ", ".join(f"{w.worker_id} is {w.progress or 'starting'}" for w in starting[:4])
        steps.append(("done", "Worker", "registered", ""))
        steps.append(("cur", "Model", told, ""))
    else:
        told = "none is registered"
        if others:
            told = f"{', '.join(w.worker_id for w in others[:4])} takes nothing new (draining)"
        steps.append(("cur" if there else "", "Worker", told, command if there else ""))
        steps.append(("", "Model", "appears here once its weights are loaded", ""))
    items = "".join(
        f'<li class="{look}"><b>{name}</b><span>{escape(told)}</span>{more}</li>'
        for look, name, told, more in steps
    )
    return (
        f'<section class="hero nm" data-testid="no-models"><div class="big">{ICONS["plug"]}</div>'
        f"<h1>No model is being served yet</h1><p>This page looks every two seconds and opens by "
        f'itself.</p><ol class="steps">{items}</ol></section>'
    )
