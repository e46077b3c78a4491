"""The cluster: who serves, how fast, what happened; and drain and resume."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from protocol.errors import TandemError
from ui import charts, states
from ui.client import ClusterEvent, ClusterView, ControllerAway, WorkerView
from ui.pages.shared import LISTEN, QUIET, banner, html, top
from ui.parts import Parts
from ui.render import kind_badge
from ui.watch import SAMPLES, Watch

EVENTS = 12
DOTS = {"ready": "", "starting": "am", "draining": "am"}
WHAT = {
    "registered": ("", "registered"),
    "restarted": ("am", "was restarted"),
    "starting": ("am", "is starting"),
    "ready": ("", "is ready"),
    "draining": ("am", "is draining"),
    "lost": ("rd", "was lost"),
    "expired": ("rd", "fell silent and was forgotten"),
    "left": ("am", "left"),
    "deregistered": ("am", "left"),
}


class ClusterPage:
    def __init__(self, parts: Parts, blocks: gr.Blocks) -> None:
        self._parts = parts
        with blocks.route("Cluster", "/cluster") as page:
            self._nav = html(top(parts, "cluster"), elem_id="nav", js_on_load=None)
            with gr.Column(elem_id="clu"):
                self._banner = html("", elem_id="banner", js_on_load=None)
                self._notice = html("", elem_id="notice", js_on_load=LISTEN)
                self._tiles = html("", js_on_load=None)
                self._charts = html("", js_on_load=None)
                self._workers = html("", elem_id="workers", js_on_load=LISTEN)
                self._events = html("", js_on_load=None)
            shown = [
                self._nav, self._banner, self._tiles, self._charts, self._workers, self._events,
            ]  # fmt: skip
            gr.Timer(2).tick(self._now, None, shown, **QUIET)
            page.load(self._now, None, shown, **QUIET)
            self._workers.select(self._command, None, [*shown, self._notice], **QUIET)
            self._notice.select(lambda: "", None, self._notice, **QUIET)

    async def _now(self) -> tuple[Any, ...]:
        watch, view = self._parts.watch, self._parts.watch.view or ClusterView()
        return (
            top(self._parts, "cluster"),
            banner(self._parts),
            tiles(watch, view),
            plots(watch),
            workers(view),
            events(view.events),
        )

    async def _command(self, event: gr.EventData) -> tuple[Any, ...]:
        data = event._data if isinstance(event._data, dict) else {}
        act, worker_id, notice = data.get("act"), str(data.get("k")), ""
        try:
            if act in ("drain", "resume"):
                await self._parts.controller.command(worker_id, act)
                await self._parts.watch.look()
        except TandemError as error:
            notice = states.not_sent(
                f"{worker_id} cannot {act} now", f"{error.message} {error.remedy}"
            )
        except ControllerAway as exc:
            notice = states.not_sent("The controller cannot be reached", f"{exc}; try again.")
        return (*await self._now(), notice)


# ---------------------------------------------------------------- what is shown


def tiles(watch: Watch, view: ClusterView) -> str:
    now = watch.history[-1] if watch.history else None
    slots = sum(worker.capacity or 0 for worker in view.ready)
    prompt = watch.counters.get("tandem_prompt_tokens_total", 0.0)
    cached = watch.counters.get("tandem_cached_prompt_tokens_total", 0.0)
    ended = {k: v for k, v in watch.counters.items() if k.startswith("outcome=")}
    good = sum(ended.get(f"outcome={name}", 0) for name in ("stop", "length", "cancelled"))
    total = sum(ended.values())
    bad = total - good
    ttft = "–" if now is None or now.ttft_s is None else f"{now.ttft_s:.2f}"
    p95 = "no request in the last minute"
    if now is not None and now.ttft_p95_s is not None:
        p95 = f"95 % within {now.ttft_p95_s:.2f} s"
    made = [
        ("Throughput", f"{now.tokens_per_s if now else 0:.0f}", "tok/s", _ready(view)),
        ("Running", f"{view.load.inflight}", f"of {slots} slots", f"{view.load.waiting} waiting"),
        ("First token", ttft, "s median", p95),
        (
            "Cache hits",
            f"{100 * cached / prompt:.0f}" if prompt else "–",
            "%",
            "of all prompt tokens",
        ),
        (
            "Errors",
            f"{100 * bad / total:.1f}" if total else "–",
            "%",
            f"{bad:.0f} of {total:.0f} requests",
        ),
    ]
    inner = "".join(
        f'<div class="kpi"><span>{name}</span><b>{value}<small>{unit}</small></b>'
        f"<em>{escape(note)}</em></div>"
        for name, value, unit, note in made
    )
    return f'<div class="kpis">{inner}</div>'


def _ready(view: ClusterView) -> str:
    number = len(view.ready)
    return f"{number} worker{'s' * (number != 1)} ready"


def plots(watch: Watch) -> str:
    past = list(watch.history)
    return (
        '<div class="chs">'
        + charts.lines(
            "Tokens per second", ["all workers"], [[s.tokens_per_s for s in past]],
            "{:.0f}".format, slots=SAMPLES, filled=True, least=10,
        )
        + charts.lines(
            "Requests", ["running", "waiting"],
            [[float(s.running) for s in past], [float(s.waiting) for s in past]],
            "{:.0f}".format, slots=SAMPLES, least=4,
        )
        + charts.lines(
            "Time to first token", ["median", "95 %"],
            [[s.ttft_s for s in past], [s.ttft_p95_s for s in past]],
            lambda v: f"{v:.2g} s", slots=SAMPLES,
        )
        + "</div>"
    )  # fmt: skip


def workers(view: ClusterView) -> str:
    rows = "".join(_row(worker) for worker in view.workers)
    if not rows:
        rows = '<tr><td colspan="10" class="none">No worker is registered.</td></tr>'
    heads = "".join(
        f'<th scope="col"{" class=num" if right else ""}>{name}</th>'
        for name, right in (
            ("Worker", 0), ("State", 0), ("Backend", 0), ("Model", 0), ("Running", 1),
            ("Waiting", 1), ("tok/s", 1), ("Cache", 1), ("Heartbeat", 1),
            ('<span class="sr">Action</span>', 0),
        )
    )  # fmt: skip
    return (
        f'<div class="tblw"><h2>Workers<span>{_ready(view)}, {len(view.workers)} in all</span></h2>'
        f'<table class="wt"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(worker: WorkerView) -> str:
    name, state = escape(worker.worker_id), str(worker.state)
    told = state.capitalize()
    if worker.progress and state == "starting":
        told = f"Starting: {worker.progress}"
    models = ", ".join(worker.bases)
    if worker.adapters:
        models += f" (+ {', '.join(worker.adapters)})"
    slots = f"/{worker.capacity}" if worker.capacity else ""
    cache = f"{100 * worker.cache.hit_rate:.0f} %" if worker.cache else "–"
    act = ""
    if state in ("ready", "draining"):
        does = "drain" if state == "ready" else "resume"
        act = (
            f'<button type="button" class="bt" data-act="{does}" data-k="{name}" '
            f'aria-label="{does.capitalize()} {name}">{does.capitalize()}</button>'
        )
    precision = f"<small>{escape(worker.precision)}</small>" if worker.precision else ""
    device = f"<small>{escape(worker.device)}</small>" if worker.device else ""
    return (
        f'<tr data-testid="worker-{name}"><td class="c1"><span class="wid">{name}</span></td>'
        f'<td class="c2"><span class="stt"><i class="dot {DOTS.get(state, "")}"></i>'
        f'{escape(told)}</span></td><td class="c3">{kind_badge(worker.kind)}</td>'
        f'<td class="c4">{escape(models)}{precision}{device}</td>'
        f'<td class="num" data-l="running">{worker.inflight}{slots}</td>'
        f'<td class="num" data-l="waiting">{worker.waiting}</td>'
        f'<td class="num" data-l="tok/s">{worker.speed:.0f}</td>'
        f'<td class="num" data-l="cache">{cache}</td>'
        f'<td class="num c10">{ago(worker.heartbeat_age_s)}</td><td class="c11">{act}</td></tr>'
    )


def events(found: tuple[ClusterEvent, ...]) -> str:
    items = ""
    for event in found[:EVENTS]:
        dot, words = WHAT.get(event.what, ("", event.what))
        reason = f": {event.reason}" if event.reason else ""
        told = f"{event.worker_id or 'A worker'} {words}{reason}"
        items += (
            f'<li><i class="dot {dot}"></i><time>{ago(event.age_s)}</time><span>'
            f"{escape(told)}</span></li>"
        )
    items = items or '<li><span class="none">Nothing has happened yet.</span></li>'
    return f'<div class="tblw"><h2>Events</h2><ul class="ev">{items}</ul></div>'


def ago(seconds: float) -> str:
    """A duration in its largest unit."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 180_000 else f"{seconds / 86400:.0f} d"
