"""Conversations as files, and all feedback as JSON lines."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from ui.images import encoded
from ui.model import Conversation
from ui.store import Database, Store

SUFFIXES = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/bmp": "bmp",
}

Load = Callable[[str], tuple[str, bytes] | None]


@dataclass(frozen=True, slots=True)
class File:
    name: str
    media_type: str
    data: bytes


async def conversation(store: Store, owner: str, conversation: str, form: str) -> File | None:
    """The file; ``None`` when the owner has no such conversation or there is no such form."""
    found = await store(store.db.conversation, owner, conversation)
    if found is None or form not in ("md", "json"):
        return None
    return await store(as_markdown if form == "md" else as_json, found, store.db.image)


def as_json(found: Conversation, load: Load) -> File:
    """OpenAI's messages, so that the conversation can be sent again; images are data URIs."""
    messages: list[dict[str, Any]] = []
    for turn in found.turns:
        content: list[dict[str, Any]] = []
        for image in turn.images:
            media_type, data = load(image.sha256) or ("image/png", b"")
            url = f"data:{media_type};base64,{encoded(data)}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        if turn.text:
            content.append({"type": "text", "text": turn.text})
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            answer = turn.answer
            messages.append(
                {
                    "role": "assistant",
                    "content": answer.text,
                    "tandem": {
                        "status": answer.status,
                        "kind": answer.kind,
                        "worker_id": answer.worker_id,
                        "settings": answer.settings.model_dump(),
                        "figures": answer.figures.model_dump(exclude_none=True),
                        "vote": answer.vote,
                        "comment": answer.comment,
                    },
                }
            )
    body = {"title": found.title, "messages": messages}
    text = json.dumps(body, ensure_ascii=False, indent=2) + "\n"
    return File(f"{_stem(found.title)}.json", "application/json", text.encode())


def as_markdown(found: Conversation, load: Load) -> File:
    """One text; where there are images, a zip of it and of them."""
    lines = [f"# {found.title}", ""]
    images: dict[str, bytes] = {}
    for turn in found.turns:
        lines += ["## You", ""]
        for image in turn.images:
            media_type, data = load(image.sha256) or ("image/png", b"")
            path = f"images/{image.sha256[:16]}.{SUFFIXES[media_type]}"
            images[path] = data
            lines += [f"![{_alt(image.name)}]({path})", ""]
        lines += [turn.text, ""]
        if turn.answer is not None:
            told = turn.answer.figures
            by = " · ".join(
                part
                for part in (
                    turn.answer.settings.model,
                    turn.answer.worker_id or turn.answer.kind or "",
                    f"{told.completion_tokens} tokens" if told.completion_tokens else "",
                )
                if part
            )
            lines += [f"## {by}", "", turn.answer.text or "(no answer)", ""]
    text = "\n".join(lines).encode()
    stem = _stem(found.title)
    if not images:
        return File(f"{stem}.md", "text/markdown; charset=utf-8", text)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{stem}.md", text)
        for path, data in images.items():
            archive.writestr(path, data)
    return File(f"{stem}.zip", "application/zip", out.getvalue())


def feedback(database: Database, out: TextIO) -> int:
    """All feedback and votes, one JSON object a line; how many there were."""
    number = 0
    for judgement in database.judgements():
        out.write(json.dumps(judgement, ensure_ascii=False) + "\n")
        number += 1
    return number


def _stem(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-").lower()[:40] or "chat"


def _alt(name: str) -> str:
    return re.sub(r"[\[\]\n]", " ", name)
