"""Whether an answer is one that a client may get; plain functions."""

from __future__ import annotations

import json
from typing import Any

from protocol.errors import ERRORS
from protocol.events import (
    NUL_MEDIA_TYPE,
    SSE_MEDIA_TYPE,
    Event,
    Failed,
    Finished,
    NulDecoder,
    SseDecoder,
    is_terminal,
)

BROKEN = frozenset({"engine_failed", "upstream_lost", "out_of_memory", "deadline_exceeded"})
"""What a worker says when something broke: typed, and yet never the fault of a picture."""

STREAMED = ("/worker_generate_stream", "/v1/chat/completions", "/v1/completions")
"""The routes whose 200 is an answer of a model."""


class Fault(Exception):
    """An answer that no client may get; the text says what is wrong with it."""


def outcome(path: str, status: int, media_type: str, body: bytes, *, prompt: str = "") -> str:
    """What came of a request: ``ok``, or the code of a typed error.

    Raises:
        Fault: the answer is neither.
    """
    if status >= 400:
        return _refusal(status, body)
    if not 200 <= status < 300:
        raise Fault(f"status {status}")
    if path not in STREAMED:
        return "ok"
    if media_type == "application/json":
        return _whole(body)
    if path.startswith("/v1/"):
        return _openai(body)
    return _stream(body, media_type, prompt)


def _refusal(status: int, body: bytes) -> str:
    error = _json(body).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    if code not in ERRORS:
        raise Fault(f"an untyped {status}")
    if ERRORS[code].status != status:
        raise Fault(f"{code} with status {status} instead of {ERRORS[code].status}")
    return str(code)


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _stream(body: bytes, media_type: str, prompt: str) -> str:
    events: list[Event]
    if media_type == SSE_MEDIA_TYPE:
        sse = SseDecoder()
        events = sse.feed(body)
        if sse.pending:
            raise Fault("a stream that ends within a frame")
    elif media_type == NUL_MEDIA_TYPE:
        nul = NulDecoder(prompt)
        events = nul.feed(body)
        if not any(is_terminal(event) for event in events):
            events += nul.end()
    else:
        raise Fault(f"a stream of {media_type!r}")
    ends = [event for event in events if is_terminal(event)]
    if len(ends) != 1 or events[-1] is not ends[0]:
        raise Fault(f"{len(ends)} terminal events in {len(events)}, the last is {events[-1:]}")
    return _ended(ends[0])


def _ended(event: Event) -> str:
    if isinstance(event, Finished):
        return "ok"
    assert isinstance(event, Failed)
    if event.code not in ERRORS:
        raise Fault(f"a failed event with the code {event.code!r}")
    return event.code


def _openai(body: bytes) -> str:
    frames = [frame.removeprefix(b"data: ") for frame in body.split(b"\n\n") if frame]
    done = [frame for frame in frames if frame == b"[DONE]"]
    errors = [frame for frame in frames if "error" in _json(frame)]
    if len(done) + len(errors) != 1 or frames[-1] not in (*done, *errors):
        last = frames[-1][-200:] if frames else b""
        raise Fault(
            f"{len(done)} [DONE] and {len(errors)} errors in {len(frames)} chunks, "
            f"the last {last!r}"
        )
    if done:
        return "ok"
    error = _json(errors[0])
    return _refusal(error.get("error_code", 0), errors[0])


def _whole(body: bytes) -> str:
    choices = _json(body).get("choices")
    if not choices or not all(choice.get("finish_reason") for choice in choices):
        raise Fault("a whole answer without a finish_reason")
    return "ok"
