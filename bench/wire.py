"""How a question is put to each kind of server, and how its stream is read: plain functions.

A stream is kept as it came, each part with the time of its arrival, and decoded after its end: the
server and we share the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from protocol.errors import TandemError
from protocol.events import SSE_MEDIA_TYPE, Delta, Failed, Finished, SseDecoder
from protocol.messages import IMAGE_PLACEHOLDER

Api = Literal["tandem", "openai", "sglang"]
Chunks = Sequence[tuple[float, bytes]]

REFUSALS = (429, 503)
"""What a server says that would rather not; anything else that is no answer is a failure."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One question with the conversation before it.

    ``messages`` are pairs of role and text, in which ``<image>`` stands for the next of ``images``
    (base64). ``answer`` is the right answer and ``fact`` what must be in it, where they are known.
    """

    messages: tuple[tuple[str, str], ...]
    images: tuple[str, ...] = ()
    max_new_tokens: int = 64
    answer: str = ""
    fact: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and what came back, undecoded; times are of ``time.perf_counter``.

    ``due_at`` is when it had to be sent. ``error`` names what ended it other than its own end.
    ``number`` is the sender's own.
    """

    due_at: float
    sent_at: float
    ended_at: float
    images: int
    status: int = 0
    chunks: Chunks = ()
    error: str = ""
    message: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """One request as its client saw it.

    ``end`` is ``stop`` or ``length`` for an answer, ``refused`` or ``failed``; ``code`` says which
    refusal or failure. ``delta_at`` are the arrivals of the deltas with text. ``output_tokens`` is
    what the server says, or the number of deltas where it says nothing (``counted``).
    """

    end: str
    sent_at: float
    ended_at: float
    late_s: float = 0.0
    code: str = ""
    message: str = ""
    delta_at: tuple[float, ...] = ()
    text: str = ""
    token_ids: tuple[int, ...] = ()
    output_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    counted: bool = False
    images: int = 0

    @property
    def answered(self) -> bool:
        return self.end in ("stop", "length")

    @property
    def ttft_s(self) -> float | None:
        return self.delta_at[0] - self.sent_at if self.delta_at else None

    @property
    def duration_s(self) -> float:
        return self.ended_at - self.sent_at


@dataclass(slots=True)
class Told:
    """What a stream said; filled while it is read."""

    end: str = ""
    code: str = ""
    message: str = ""
    delta_at: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    def delta(self, at: float, text: str) -> None:
        if text:
            self.delta_at.append(at)
            self.texts.append(text)

    def usage(self, said: Mapping[str, Any]) -> None:
        """OpenAI's usage object."""
        self.output_tokens = said.get("completion_tokens", self.output_tokens)
        self.prompt_tokens = said.get("prompt_tokens", self.prompt_tokens)
        details = said.get("prompt_tokens_details") or {}
        self.cached_tokens = details.get("cached_tokens", self.cached_tokens)


Template = Callable[[Ask], str]
"""The prompt of a conversation as text, by the model's own chat template."""


# ---------------------------------------------------------------- questions

PATHS: Mapping[Api, str] = {
    "tandem": "/worker_generate_stream",
    "openai": "/v1/chat/completions",
    "sglang": "/generate",
}
HEADERS: Mapping[Api, Mapping[str, str]] = {
    api: {"content-type": "application/json", "accept": SSE_MEDIA_TYPE} for api in PATHS
}


def tandem_body(ask: Ask, model: str, extra: Mapping[str, Any]) -> bytes:
    body = {
        "model": model,
        "messages": [{"role": role, "content": text} for role, text in ask.messages],
        "images": ask.images,
        "temperature": 0,
        "max_new_tokens": ask.max_new_tokens,
    }
    return orjson.dumps(body | dict(extra))


def openai_body(ask: Ask, model: str, extra: Mapping[str, Any]) -> bytes:
    images = iter(ask.images)
    body = {
        "model": model,
        "messages": [
            {"role": role, "content": _openai_content(text, images)} for role, text in ask.messages
        ],
        "temperature": 0,
        "max_tokens": ask.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return orjson.dumps(body | dict(extra))


def _openai_content(text: str, images: Iterator[str]) -> str | list[dict[str, Any]]:
    if IMAGE_PLACEHOLDER not in text:
        return text
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            url = f"data:image/png;base64,{next(images)}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def sglang_body(ask: Ask, template: Template) -> bytes:
    sampling = {"temperature": 0, "max_new_tokens": ask.max_new_tokens}
    body: dict[str, Any] = {"text": template(ask), "stream": True}
    if ask.images:
        body["image_data"] = ask.images
    return orjson.dumps(body | {"sampling_params": sampling})


# ---------------------------------------------------------------- answers


def reply_of(api: Api, exchange: Exchange) -> Reply:
    """What the client of ``exchange`` saw."""
    told = Told()
    if exchange.status == 200:
        try:
            _READERS[api](exchange.chunks, told)
        except (orjson.JSONDecodeError, TandemError, LookupError, TypeError, AttributeError) as exc:
            told.end, told.code, told.message = "failed", "unreadable", str(exc)
    elif exchange.status:
        _refusal(exchange, told)
    if exchange.error and told.end not in ("stop", "length"):
        told.end, told.code, told.message = "failed", exchange.error, exchange.message
    if not told.end:
        told.end, told.code, told.message = "failed", "cut", "The stream ended without its end."
    counted = told.output_tokens is None
    return Reply(
        end=told.end,
        sent_at=exchange.sent_at,
        ended_at=exchange.ended_at,
        late_s=exchange.sent_at - exchange.due_at,
        code=told.code,
        message=told.message[:300],
        delta_at=tuple(told.delta_at),
        text="".join(told.texts),
        token_ids=tuple(told.token_ids),
        output_tokens=len(told.delta_at) if told.output_tokens is None else told.output_tokens,
        prompt_tokens=told.prompt_tokens,
        cached_tokens=told.cached_tokens,
        counted=counted and told.end in ("stop", "length"),
        images=exchange.images,
    )


def _refusal(exchange: Exchange, told: Told) -> None:
    body = b"".join(data for _, data in exchange.chunks)
    told.end = "refused" if exchange.status in REFUSALS else "failed"
    told.code, told.message = str(exchange.status), body.decode(errors="replace")
    try:
        said = orjson.loads(body)["error"]
        told.code += f" {said['code']}" if said.get("code") else ""
        told.message = said["message"]
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        pass  # another server's words


def _read_tandem(chunks: Chunks, told: Told) -> None:
    decoder = SseDecoder()
    for at, data in chunks:
        for event in decoder.feed(data):
            match event:
                case Delta():
                    told.delta(at, event.text)
                    told.token_ids += event.token_ids
                case Finished():
                    told.end = event.reason
                    told.output_tokens = event.completion_tokens
                    told.prompt_tokens = event.prompt_tokens
                    told.cached_tokens = event.cached_tokens
                case Failed():
                    told.end, told.code, told.message = "failed", event.code, event.message


def _read_openai(chunks: Chunks, told: Told) -> None:
    for at, payload in payloads(chunks):
        if payload == b"[DONE]":
            continue
        said = orjson.loads(payload)
        if error := said.get("error"):
            told.end, told.code, told.message = "failed", str(error.get("code")), error["message"]
            continue
        if usage := said.get("usage"):
            told.usage(usage)
        for choice in said.get("choices") or ():
            told.delta(at, choice["delta"].get("content") or "")
            if reason := choice.get("finish_reason"):
                told.end = "length" if reason == "length" else "stop"


def _read_sglang(chunks: Chunks, told: Told) -> None:
    """``/generate``: text and ids may be those so far, or the new ones."""
    text, ids = "", 0
    for at, payload in payloads(chunks):
        if payload == b"[DONE]":
            continue
        said = orjson.loads(payload)
        if error := said.get("error"):
            told.end, told.code, told.message = "failed", "error", str(error)
            continue
        meta = said["meta_info"]
        told.output_tokens = tokens = meta["completion_tokens"]
        told.prompt_tokens = meta.get("prompt_tokens")
        told.cached_tokens = meta.get("cached_tokens")
        given = said.get("output_ids") or []
        so_far = len(given) == tokens
        told.token_ids += given[ids:] if so_far else given
        ids = len(told.token_ids)
        new = said["text"]
        new = new[len(text) :] if so_far and new.startswith(text) else new
        text += new
        told.delta(at, new)
        if (finish := meta["finish_reason"]) is not None:
            _sglang_end(finish, told)


def _sglang_end(finish: Mapping[str, Any], told: Told) -> None:
    if finish["type"] in ("stop", "length"):
        told.end = finish["type"]
        return
    status = int(finish.get("status_code") or 0)
    told.end = "refused" if status in REFUSALS else "failed"
    told.code, told.message = str(status or finish["type"]), str(finish.get("message"))


_READERS: Mapping[Api, Callable[[Chunks, Told], None]] = {
    "tandem": _read_tandem,
    "openai": _read_openai,
    "sglang": _read_sglang,
}


def payloads(chunks: Chunks) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, with the time at which it was complete."""
    pending = b""
    for at, data in chunks:
        *frames, pending = (pending + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in frames:
            lines = [line for line in frame.split(b"\n") if line.startswith(b"data:")]
            if payload := b"\n".join(line[5:].strip() for line in lines):
                yield at, payload
