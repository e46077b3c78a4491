"""What people do with a conversation: ask, ask again, reword, take back, continue, judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from anyio import to_thread

from protocol.messages import IMAGE_PLACEHOLDER
from ui import states
from ui.images import Picture, encoded
from ui.model import Answer, Conversation, Settings, Turn, Vote
from ui.parts import Parts


def messages_of(turns: Sequence[Turn], system: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The turns as a request's ``messages``, and the hashes of their images in order.

    The last turn is the question; a question that was never answered is told with the next one.
    """
    messages: list[dict[str, Any]] = []
    hashes: list[str] = []
    if system.strip():
        messages.append({"role": "system", "content": _text(system)})
    parts: list[dict[str, str]] = []
    for index, turn in enumerate(turns):
        hashes += [image.sha256 for image in turn.images]
        parts += [{"type": "image"} for _ in turn.images]
        if turn.text:
            parts.append({"type": "text", "text": _text(turn.text)})
        answer = turn.answer if index < len(turns) - 1 else None
        if answer is not None and answer.text:
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": _text(answer.text)})
            parts = []
    messages.append({"role": "user", "content": parts})
    return messages, hashes


def _text(text: str) -> str:
    """``text`` without what would stand for an image."""
    return text.replace(IMAGE_PLACEHOLDER, "<image >")


def fields_of(
    settings: Settings, messages: list[dict[str, Any]], images: list[str], request_id: str
) -> dict[str, Any]:
    """The request."""
    fields: dict[str, Any] = {
        "model": settings.model,
        "messages": messages,
        "images": images,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_new_tokens": settings.max_tokens,
        "request_id": request_id,
    }
    optional = {"seed": settings.seed, "kind": settings.kind, "adapter": settings.adapter}
    return fields | {name: value for name, value in optional.items() if value is not None}


class Talk:
    """The verbs. Each checks that the conversation is its owner's."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._store = parts.store

    async def ask(
        self,
        owner: str,
        conversation: str | None,
        text: str,
        pictures: Sequence[Picture],
        settings: Settings,
    ) -> str:
        """Ask a question and begin its answer; the conversation's id."""
        db = self._store.db
        named = []
        for picture in pictures:
            size = (picture.width, picture.height)
            await self._store(db.keep, picture.sha256, picture.media_type, size, picture.data)
            named.append((picture.sha256, picture.name))
        await self._parts.jobs.stop(conversation)
        asked_in, _ = await self._store(db.ask, owner, conversation, text, named)
        await self._begin(owner, asked_in, -1, settings)
        return asked_in

    async def again(self, owner: str, conversation: str, index: int, settings: Settings) -> None:
        """Another answer to an earlier question; what came after it is forgotten."""
        turn = await self._cut(owner, conversation, index)
        if turn is not None:
            await self._begin(owner, conversation, index, settings)

    async def reword(
        self, owner: str, conversation: str, index: int, text: str, settings: Settings
    ) -> None:
        """Change a question, its images kept, and have it answered."""
        turn = await self._cut(owner, conversation, index)
        if turn is not None and (text.strip() or turn.images):
            await self._store(self._store.db.reword, turn.id, text.strip())
            await self._begin(owner, conversation, index, settings)

    async def take_back(self, owner: str, conversation: str) -> Turn | None:
        """Forget the last question and its answers, and return it."""
        found = await self._find(owner, conversation)
        if found is None or not found.turns:
            return None
        await self._parts.jobs.stop(conversation)
        turn = found.turns[-1]
        await self._store(self._store.db.drop, turn.id)
        return turn

    async def go_on(self, owner: str, conversation: str, index: int) -> None:
        """Continue an incomplete answer at its very token, on whichever worker can."""
        found = await self._find(owner, conversation)
        turn = _at(found, index)
        if found is None or turn is None or turn.answer is None or not turn.answer.token_ids:
            return
        answer = turn.answer
        await self._parts.jobs.stop(conversation)
        await self._parts.watch.look()  # who is left is known a moment after a loss
        view = self._parts.watch.view
        settings = answer.settings
        if view is not None and settings.kind not in view.kinds(settings.model):
            settings = settings.model_copy(update={"kind": None})
        messages, images = await self._messages(
            found.turns[: found.turns.index(turn) + 1], settings
        )
        answer.request_id = uuid4().hex
        fields = fields_of(settings, messages, images, answer.request_id)
        fields["resume_token_ids"] = list(answer.token_ids)
        fields["max_new_tokens"] = len(answer.token_ids) + settings.max_tokens
        answer.status, answer.failure, answer.worker_id = "running", None, None
        answer.kind = settings.kind
        await self._store(self._store.db.save, answer)
        await self._parts.jobs.start(conversation, answer, fields)

    async def choose(self, owner: str, conversation: str, index: int, current: int) -> None:
        """Show another answer to a question."""
        turn = _at(await self._find(owner, conversation), index)
        if turn is not None and 0 <= current < len(turn.answers):
            await self._store(self._store.db.choose, turn.id, current)

    async def judge(
        self, owner: str, conversation: str, index: int, vote: Vote, comment: str | None
    ) -> None:
        """Like or dislike an answer; the same again, without a comment, takes it back."""
        turn = _at(await self._find(owner, conversation), index)
        if turn is None or turn.answer is None:
            return
        answer = turn.answer
        if comment is None:
            comment = "" if vote != answer.vote else answer.comment
            chosen = None if vote == answer.vote else vote
            await self._store(self._store.db.judge, answer.id, chosen, comment if chosen else "")
        else:
            await self._store(self._store.db.judge, answer.id, vote, comment)

    async def delete(self, owner: str, conversation: str) -> None:
        """Forget a conversation."""
        if await self._find(owner, conversation) is not None:
            await self._parts.jobs.stop(conversation)
            await self._store(self._store.db.delete, owner, conversation)

    # ---------------------------------------------------------------- the parts of the verbs

    async def _find(self, owner: str, conversation: str) -> Conversation | None:
        return await self._store(self._store.db.conversation, owner, conversation)

    async def _cut(self, owner: str, conversation: str, index: int) -> Turn | None:
        """Stop what is being written and forget what follows a turn; the turn."""
        turn = _at(await self._find(owner, conversation), index)
        if turn is not None:
            await self._parts.jobs.stop(conversation)
            await self._store(self._store.db.cut_after, turn.id)
        return turn

    async def _begin(self, owner: str, conversation: str, index: int, settings: Settings) -> None:
        found = await self._find(owner, conversation)
        turn = _at(found, index)
        if found is None or turn is None:
            return
        turns = found.turns[: found.turns.index(turn) + 1]
        messages, images = await self._messages(turns, settings)
        request_id = uuid4().hex
        answer_id = await self._store(self._store.db.begin, turn.id, settings, request_id)
        answer = Answer(answer_id, settings, kind=settings.kind, request_id=request_id)
        fields = fields_of(settings, messages, images, request_id)
        await self._parts.jobs.start(conversation, answer, fields)

    async def _messages(
        self, turns: Sequence[Turn], settings: Settings
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """``messages`` and ``images`` of a request; each image is encoded here, once."""
        messages, hashes = messages_of(turns, settings.system)
        images = []
        for sha256 in hashes:
            found = await self._store(self._store.db.image, sha256)
            assert found is not None, "an image of a turn is kept as long as the turn"
            images.append(await to_thread.run_sync(encoded, found[1]))
        return messages, images


def _at(conversation: Conversation | None, index: int) -> Turn | None:
    turns = conversation.turns if conversation else []
    return turns[index] if -len(turns) <= index < len(turns) else None


def able(parts: Parts, settings: Settings, *, images: bool) -> str | None:
    """Why a question cannot be asked as things are; ``None`` when it can.

    What the controller finds out by itself is left to it: it tells it better.
    """
    view = parts.watch.view
    if not settings.model:
        return states.not_sent(
            "There is no model to ask yet",
            "Your message is kept; the page opens as soon as a worker has loaded one.",
        )
    serving = [w for w in (view.ready if view else ()) if settings.model in w.bases]
    if images and serving and not any(worker.capabilities.images for worker in serving):
        return states.not_sent(
            f"{settings.model} reads text only",
            "Choose a model that sees images above, or remove the image. Your message is kept.",
        )
    return None
