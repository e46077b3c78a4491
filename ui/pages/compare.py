"""Compare: one question to two targets at once, and a vote."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import gradio as gr
from anyio import to_thread

from ui import duel
from ui.client import ClusterView
from ui.duel import Duel, Side
from ui.images import encoded
from ui.jobs import FRAME_S, Job
from ui.model import Answer, Settings
from ui.pages.shared import LONG, QUIET, banner, composer, html, owner_of, top
from ui.parts import Parts
from ui.render import KINDS
from ui.talk import fields_of
from ui.uploads import attached

CHOICES = {"a": "A is better", "tie": "Tie", "both_bad": "Both bad", "b": "B is better"}

Updates = dict[Any, Any]


class Page:
    """What one open page compares."""

    def __init__(self) -> None:
        self.duel: Duel | None = None
        self.seen: object = None
        self.proposed: tuple[str | None, str | None] = (None, None)

    def __deepcopy__(self, memo: object) -> Page:
        return Page()


class ComparePage:
    def __init__(self, parts: Parts, blocks: gr.Blocks) -> None:
        self._parts = parts
        with blocks.route("Compare", "/compare") as page:
            self._layout()
            self._wire(page)

    def _layout(self) -> None:
        parts = self._parts
        self.page = gr.State(Page())
        self.nav = html(top(parts, "compare"), elem_id="nav", js_on_load=None)
        with gr.Column(elem_id="cmp"):
            with gr.Row(elem_id="cmp-bar"):
                self.targets = [
                    gr.Dropdown(
                        [], label=f"Target {name}", show_label=False, container=False,
                        filterable=False, elem_id=f"target-{name.lower()}",
                    )
                    for name in "AB"
                ]  # fmt: skip
                self.blind = gr.Checkbox(
                    label="Blind", container=False, elem_id="blind", info="", min_width=0
                )
            self.banner = html("", elem_id="banner", js_on_load=None)
            self.body = html("", elem_id="cbody", js_on_load=None)
            with gr.Row(elem_id="votes", visible=False) as self.votes:
                self.buttons = {
                    choice: gr.Button(label, size="sm") for choice, label in CHOICES.items()
                }
        with gr.Column(elem_id="dock"):
            self.notice = html("", elem_id="notice", js_on_load=None)
            self.box = composer(parts, placeholder="Ask both")
        self.timer = gr.Timer(2)

    def _wire(self, page: gr.Blocks) -> None:
        shown = [self.body, self.votes, self.notice, self.box]
        asked = [self.page, self.box, *self.targets, self.blind]
        self.box.submit(self._run, asked, shown, **LONG)
        self.box.stop(self._stop, [self.page], None, **QUIET)
        for choice, button in self.buttons.items():
            button.click(self._voting(choice), [self.page], [self.body, self.votes], **QUIET)
        ticked = [self.nav, self.banner, self.body, self.box, *self.targets]
        self.timer.tick(self._tick, [self.page, *self.targets], ticked, **QUIET)
        page.load(self._tick, [self.page, *self.targets], ticked, **QUIET)

    # ---------------------------------------------------------------- events

    async def _run(
        self,
        page: Page,
        message: dict[str, Any],
        a: str | None,
        b: str | None,
        blind: bool,
        request: gr.Request,
    ) -> AsyncIterator[Updates]:
        text, files = (message.get("text") or "").strip(), message.get("files") or []
        if not a or not b or not (text or files):
            return
        pictures, problem = await to_thread.run_sync(attached, self._parts.settings, files, False)
        if problem:
            yield {self.notice: problem}
            return
        store = self._parts.store
        hashes = []
        for picture in pictures:
            size = (picture.width, picture.height)
            await store(store.db.keep, picture.sha256, picture.media_type, size, picture.data)
            hashes.append(picture.sha256)
        images = [await to_thread.run_sync(encoded, picture.data) for picture in pictures]
        targets = [json.loads(a), json.loads(b)]
        if blind:
            random.shuffle(targets)
        sides = [self._begin(target, text, images) for target in targets]
        page.duel = Duel(text, hashes, sides, blind=blind)
        try:
            yield self._shown(page.duel, first=True)
            while any(not side.job.ended for side in sides):
                await asyncio.wait(
                    [
                        asyncio.create_task(side.job.changed(1.0))
                        for side in sides
                        if not side.job.ended
                    ],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                await asyncio.sleep(FRAME_S)
                yield {self.body: duel.body(page.duel, self._parts.root)}
            yield self._shown(page.duel)
        finally:
            for side in sides:
                await side.job.stop()

    def _begin(self, target: list[str | None], text: str, images: list[str]) -> Side:
        model, kind, adapter = target
        settings = Settings(model=model or "", kind=kind, adapter=adapter)
        answer = Answer(0, settings, kind=kind, request_id=uuid4().hex)
        content: list[dict[str, str]] = [{"type": "image"} for _ in images]
        if text:
            content.append({"type": "text", "text": text.replace("<image>", "<image >")})
        fields = fields_of(
            settings, [{"role": "user", "content": content}], images, answer.request_id
        )
        return Side(Job(self._parts.controller, answer, fields, _forget))

    def _shown(self, shown: Duel, *, first: bool = False) -> Updates:
        box: dict[str, Any] = {"value": None} if first else {}
        running = not shown.ended
        return {
            self.body: duel.body(shown, self._parts.root),
            self.votes: gr.Row(visible=shown.votable),
            self.notice: "",
            self.box: gr.MultimodalTextbox(submit_btn=not running, stop_btn=running, **box),
        }

    async def _stop(self, page: Page) -> None:
        if page.duel is not None:
            for side in page.duel.sides:
                await side.job.stop()

    def _voting(self, choice: str) -> Any:
        async def vote(page: Page, request: gr.Request) -> Updates:
            found = page.duel
            if found is None or not found.votable:
                return {self.votes: gr.Row(visible=False)}
            found.choice = choice
            a, b = (side.told() for side in found.sides)
            store = self._parts.store
            await store(
                store.db.vote, owner_of(request), found.question, found.images, a, b,
                choice=choice, blind=found.blind,
            )  # fmt: skip
            return {
                self.body: duel.body(found, self._parts.root),
                self.votes: gr.Row(visible=False),
            }

        return vote

    async def _tick(self, page: Page, a: str | None, b: str | None) -> Updates:
        """Every two seconds: whatever changed in the cluster."""
        view, alert = self._parts.watch.view, banner(self._parts)
        choices = targets(view)
        seen = (str(choices), alert, top(self._parts, "compare"))
        if seen == page.seen:
            return {self.nav: gr.skip()}
        page.seen = seen
        values = [value for _, value in choices]
        chosen = (a, b)
        if chosen in ((None, None), page.proposed) and page.duel is None:
            # Nobody has chosen yet: two kinds are what people want to compare.
            first = values[0] if values else None
            others = [value for value in values[1:] if kind_of(value) != kind_of(values[0])]
            chosen = (first, next(iter([*others, *values[1:], first])))
            page.proposed = chosen
        updates: Updates = {self.nav: seen[2], self.banner: alert}
        for dropdown, value, before in zip(self.targets, chosen, (a, b), strict=True):
            labels = list(choices)
            if value is not None and value not in values:
                labels.append((f"{label(json.loads(value))} (not served now)", value))
            changed = {} if value == before else {"value": value}
            updates[dropdown] = gr.Dropdown(choices=labels, **changed)
        if page.duel is None:
            updates[self.body] = duel.empty(bool(values))
        return updates


async def _forget(answer: Answer) -> None:
    """A comparison is kept when somebody votes, and not before."""


def targets(view: ClusterView | None) -> list[tuple[str, str]]:
    """Label and value of each model, kind and adapter that is served now."""
    found: list[tuple[str, str]] = []
    for model in view.bases if view else []:
        for worker in view.ready if view else ():
            if model in worker.bases:
                for adapter in (None, *worker.adapters):
                    target = [model, worker.kind, adapter]
                    found.append((label(target), json.dumps(target)))
    return list(dict.fromkeys(found))


def kind_of(value: str) -> str | None:
    target: list[str | None] = json.loads(value)
    return target[1]


def label(target: list[str | None]) -> str:
    model, kind, adapter = target
    parts = (model, KINDS.get(kind or "", kind), adapter)
    return " · ".join(part for part in parts if part)
