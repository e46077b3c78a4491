"""The chat: what is on the page, and which event does what."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any

import gradio as gr
from anyio import to_thread

from ui import hero, images, render
from ui.model import Settings
from ui.pages.chat_layout import HINT_BOX, ChatLayout
from ui.pages.shared import LONG, QUIET, banner, owner_of, top
from ui.parts import HERE, Parts
from ui.talk import Talk, able
from ui.uploads import attached, unpack
from ui.view import View

Updates = dict[Any, Any]
Change = Callable[[], Awaitable[Updates | None]]


class ChatPage(ChatLayout):
    """Built once; each open page has a ``View``."""

    def __init__(self, parts: Parts, blocks: gr.Blocks) -> None:
        self._parts = parts
        self._talk = Talk(parts)
        with blocks:
            super().__init__(parts)
            self._wire(blocks)

    def _wire(self, blocks: gr.Blocks) -> None:
        asked = [
            self.model, self.kind, self.adapter, self.temperature, self.top_p, self.max_tokens,
            self.seed, self.system,
        ]  # fmt: skip
        everything = [
            self.nav, self.list, self.export, self.banner, self.tx, self.live, self.notice,
            self.box, self.said, *asked,
        ]  # fmt: skip
        spoken = [self.view, self.box, *asked]
        for event in (
            self.box.submit(self._submit, spoken, everything, **LONG),
            self.tx.select(self._act, spoken, everything, **LONG),
            self.notice.select(self._act, spoken, everything, **LONG),
            self.list.select(self._act, spoken, everything, **LONG),
            self.new.click(self._open_new, [self.view], everything, **LONG),
            blocks.load(self._load, [self.view], everything, **LONG),
        ):
            # Streamed into one component: what an update costs goes with the number of outputs.
            following = event.then(self._follow, [self.view], [self.live], **LONG)
            following.then(self._finish, [self.view], everything, **LONG)
        self.box.stop(self._stop, [self.view], None, **QUIET)
        self.find.change(
            self._search,
            [self.view, self.find],
            [self.list],
            # In the same stream as the events above, so that no older list comes after its own.
            **LONG | {"trigger_mode": "always_last"},
        )
        self.timer.tick(self._tick, [self.view, self.model, self.adapter], everything, **QUIET)

    # ---------------------------------------------------------------- events

    async def _load(self, view: View, request: gr.Request) -> Updates:
        async def change() -> Updates:
            view.conversation = request.query_params.get("c")
            return {self.nav: top(self._parts, "chat")}

        return await self._write(view, request, change, restore=True)

    async def _open_new(self, view: View, request: gr.Request) -> Updates:
        async def change() -> None:
            view.conversation = None

        return await self._write(view, request, change)

    async def _submit(
        self, view: View, message: dict[str, Any], request: gr.Request, *asked: Any
    ) -> Updates:
        return await self._send(view, message, _settings(*asked), request)

    async def _send(
        self,
        view: View,
        message: dict[str, Any],
        settings: Settings,
        request: gr.Request,
        *,
        shrink: bool = False,
    ) -> Updates:
        text, files = (message.get("text") or "").strip(), message.get("files") or []
        if not text and not files:
            return {self.notice: ""}
        pictures, problem = await to_thread.run_sync(attached, self._parts.settings, files, shrink)
        problem = problem or able(self._parts, settings, images=bool(files))
        if problem:
            return {self.notice: problem}

        async def change() -> Updates:
            view.conversation = await self._talk.ask(
                owner_of(request), view.conversation, text, pictures, settings
            )
            return {self.box: gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)}

        return await self._write(view, request, change)

    async def _act(
        self,
        view: View,
        message: dict[str, Any],
        request: gr.Request,
        event: gr.EventData,
        *asked: Any,
    ) -> Updates:
        """A click in the HTML: ``act`` says what, ``i`` in which turn."""
        settings, owner = _settings(*asked), owner_of(request)
        data: dict[str, Any] = event._data if isinstance(event._data, dict) else {}
        act = str(data.get("act"))
        if act == "shrink":
            return await self._send(view, message, settings, request, shrink=True)
        if act == "dismiss":
            kept: dict[str, Any] = {"text": message.get("text") or "", "files": []}
            return {self.notice: "", self.box: gr.MultimodalTextbox(value=kept)}

        async def change() -> Updates | None:
            if act in ("open", "new"):
                view.conversation = str(data.get("k")) if act == "open" else None
            elif act == "example" and data.get("k") in hero.EXAMPLES:
                return await self._example(view, owner, str(data["k"]), settings)
            elif act in ("rename", "delete"):
                await self._tidy(view, owner, act, data)
            elif act == "undo" and view.conversation is not None:
                return await self._undo(owner, view.conversation)
            elif view.conversation is not None:
                await self._on_turn(owner, view.conversation, act, data, settings)
            return None

        return await self._write(view, request, change, restore=act == "open")

    async def _tidy(self, view: View, owner: str, act: str, data: dict[str, Any]) -> None:
        """Rename or delete a conversation of the list."""
        named, store = str(data.get("k")), self._parts.store
        if act == "rename":
            await store(store.db.rename, owner, named, str(data.get("text")))
            return
        await self._talk.delete(owner, named)
        if named == view.conversation:
            view.conversation = None

    async def _on_turn(
        self, owner: str, conversation: str, act: str, data: dict[str, Any], settings: Settings
    ) -> None:
        """What the buttons of a turn do."""
        talk, index = self._talk, _number(data.get("i"))
        if act == "retry":
            await talk.again(owner, conversation, index, settings)
        elif act == "edit":
            await talk.reword(owner, conversation, index, str(data.get("text")), settings)
        elif act == "continue":
            await talk.go_on(owner, conversation, index)
        elif act == "branch":
            await talk.choose(owner, conversation, index, _number(data.get("to")))
        elif act == "judge" and data.get("v") in ("up", "down"):
            comment = data.get("comment")
            said = None if comment is None else str(comment)
            await talk.judge(owner, conversation, index, data["v"], said)

    async def _example(
        self, view: View, owner: str, name: str, settings: Settings
    ) -> Updates | None:
        problem = able(self._parts, settings, images=name != hero.WITHOUT_PICTURE)
        if problem:
            return {self.notice: problem}
        pictures = []
        if name != hero.WITHOUT_PICTURE:
            path = HERE / "examples" / f"{name}.png"
            pictures.append(images.read(path.name, await to_thread.run_sync(path.read_bytes)))
        question = hero.EXAMPLES[name][1]
        view.conversation = await self._talk.ask(owner, None, question, pictures, settings)
        return None

    async def _undo(self, owner: str, conversation: str) -> Updates | None:
        turn = await self._talk.take_back(owner, conversation)
        if turn is None:
            return None
        store, files = self._parts.store, []
        for image in turn.images:
            found = await store(store.db.image, image.sha256)
            if found is not None:
                files.append(
                    await to_thread.run_sync(unpack, self._parts.uploads, image.name, found[1])
                )
        return {self.box: gr.MultimodalTextbox(value={"text": turn.text, "files": files})}

    async def _stop(self, view: View) -> None:
        await self._parts.jobs.stop(view.conversation)

    async def _search(self, view: View, text: str, request: gr.Request) -> str:
        view.search = text
        return await self._listed(view, owner_of(request))

    async def _tick(
        self, view: View, model: str | None, adapter: str | None, request: gr.Request
    ) -> Updates:
        """Every two seconds: whatever changed in the cluster, and nothing else."""
        if view.stuck and self._parts.jobs.of(view.conversation) is None:
            # The browser did not come back for the end of an answer: its connection was lost.
            return await self._everything(view, owner_of(request), writing=False)
        watch = self._parts.watch
        cluster, alert = watch.view, banner(self._parts)
        models = cluster.bases if cluster else []
        states_ = [(w.worker_id, w.state, w.progress) for w in cluster.workers] if cluster else []
        seen = (watch.there, tuple(models), str(states_), alert, model)
        if seen == view.seen:
            return {self.nav: gr.skip()}
        view.seen = seen
        updates: Updates = {
            self.nav: top(self._parts, "chat"),
            self.banner: alert,
        }
        updates |= self._choices(model, adapter)
        updates[self.box] = gr.MultimodalTextbox(placeholder=self._hint())
        if view.conversation is None:
            updates[self.tx] = self._empty()
        return updates

    # ---------------------------------------------------------------- the page as it is now

    async def _write(
        self, view: View, request: gr.Request, change: Change, *, restore: bool = False
    ) -> Updates:
        """Make a change, and show everything as it then is."""
        async with view.writing():
            view.ended = False
            changed = await change() or {}
            job = self._parts.jobs.of(view.conversation)
            return await self._everything(
                view, owner_of(request), writing=job is not None, restore=restore
            ) | changed  # fmt: skip

    async def _follow(self, view: View) -> AsyncIterator[Any]:
        """Show the answer that is being written until it has ended, or something else is shown."""
        jobs = self._parts.jobs
        yield gr.skip()
        async with view.writing() as mine:
            view.ended = False
            job = jobs.of(view.conversation)
            if job is None:
                view.ended = view.unfinished  # it was quicker than this event
                return
            view.on_handover(job.wake)
            async for _ in jobs.frames(job):
                if not mine():
                    return
                yield render.live(job, self._parts.watch.view)
            view.ended = mine()

    async def _finish(self, view: View, request: gr.Request) -> Updates:
        """The complete answer in its place in the transcript."""
        if not view.ended:
            return {self.nav: gr.skip()}
        view.ended = False
        async with view.writing():
            job = self._parts.jobs.of(view.conversation)
            shown = await self._everything(view, owner_of(request), writing=job is not None)
            return shown | {self.said: '<span role="status">The answer is complete.</span>'}

    async def _everything(
        self, view: View, owner: str, *, writing: bool, restore: bool = False
    ) -> Updates:
        parts, store = self._parts, self._parts.store
        found = None
        if view.conversation is not None:
            found = await store(store.db.conversation, owner, view.conversation)
            if found is None:
                view.conversation = None
        job = parts.jobs.of(view.conversation) if writing else None
        view.unfinished = job is not None
        shown = self._empty() if found is None else render.transcript(
            found, parts.watch.view, root=parts.root, writing=job is not None
        )  # fmt: skip
        updates: Updates = {
            self.tx: shown,
            self.live: render.live(job, parts.watch.view) if job else "",
            self.list: await self._listed(view, owner),
            self.export: render.exports(view.conversation, parts.root),
            self.notice: "",
            self.said: "",
            self.box: gr.MultimodalTextbox(
                submit_btn=job is None, stop_btn=job is not None, placeholder=self._hint()
            ),
        }
        last = found.turns[-1].answer if found and found.turns else None
        if restore:
            view.seen = None
            updates |= self._restored(last.settings if last else None)
        return updates

    def _restored(self, settings: Settings | None) -> Updates:
        """The controls as they were for an answer; as they are, when there is none."""
        if settings is None:
            return self._choices(None, None)
        return self._choices(settings.model, settings.adapter, choose=True) | {
            self.kind: settings.kind or "auto",
            self.temperature: settings.temperature,
            self.top_p: settings.top_p,
            self.max_tokens: settings.max_tokens,
            self.seed: "" if settings.seed is None else str(settings.seed),
            self.system: settings.system,
        }

    def _choices(self, model: str | None, adapter: str | None, *, choose: bool = False) -> Updates:
        """Models and adapters as served now. A choice stays, though what it names may be gone:
        only ``choose`` and the first model ever change it."""
        cluster = self._parts.watch.view
        models = list(cluster.bases) if cluster else []
        chosen = model or (models[0] if models else None)
        labels = [(name, name) for name in models]
        if chosen is not None and chosen not in models:
            labels.append((f"{chosen} (not served now)", chosen))
        adapters = cluster.adapters(chosen) if cluster else []
        names = [("None", ""), *((name, name) for name in adapters)]
        if adapter and adapter not in adapters:
            names.append((f"{adapter} (not loaded now)", adapter))
        # A value that is sent would undo what is being chosen at this moment.
        to_model = {"value": chosen} if choose or not model else {}
        to_adapter = {"value": adapter or ""} if choose else {}
        return {
            self.model: gr.Dropdown(choices=labels, **to_model),
            self.adapter: gr.Dropdown(choices=names, **to_adapter),
        }

    def _hint(self) -> str:
        view = self._parts.watch.view
        return HINT_BOX if view is not None and view.bases else "Waiting for a model …"

    def _empty(self) -> str:
        watch = self._parts.watch
        if watch.view is not None and watch.view.bases:
            return f'<div data-c="">{hero.welcome(self._parts.root)}</div>'
        waiting = hero.unserved(watch.view, self._parts.controller.address, there=watch.there)
        return f'<div data-c="">{waiting}</div>'

    async def _listed(self, view: View, owner: str) -> str:
        store = self._parts.store
        listed = await store(store.db.listed, owner, view.search)
        return render.conversations(listed, view.conversation, datetime.now().astimezone())


def _settings(
    model: str | None, kind: str, adapter: str | None, temperature: float, top_p: float,
    max_tokens: float, seed: str, system: str,
) -> Settings:  # fmt: skip
    digits = str(seed or "").strip()
    return Settings(
        model=model or "",
        kind=None if kind == "auto" else kind,
        adapter=adapter or None,
        temperature=temperature,
        top_p=top_p,
        max_tokens=int(max_tokens),
        seed=int(digits) % 2**63 if digits.isdecimal() else None,
        system=system or "",
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1
