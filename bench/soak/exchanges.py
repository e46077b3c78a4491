"""Requests as bytes in all three dialects, and what must come back.

Shares no code with what it tests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OUTCOMES = (
    *("ok", "left", "bad_ok", "refused"),
    *("lost", "cut", "failed", "duplicated", "wrong", "timeout"),
)
GOOD = ("ok", "left", "bad_ok")

_END = 256  # the echo engine's end-of-sequence token
_LETTERS = 'abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ 0123456789 .,;:!?"\\\n éßñ €漢字 🚲'


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as bytes, and the check of its reply."""

    request: bytes
    check: Callable[[int, bytes], str]  # status, body -> outcome


def _post(path: str, body: bytes, accept: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
        f"accept: {accept}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def good_exchange(rng: random.Random, min_tokens: int, max_tokens: int) -> Exchange:
    """A random text to be echoed, in one of the three dialects."""
    size = rng.randint(min_tokens, max_tokens) - 1  # bytes; the end token is one more
    text = "".join(rng.choices(_LETTERS, k=size)).encode()[:size].decode("utf-8", "ignore")
    dialect = rng.random()
    if dialect < 0.1:
        fields: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "stream": True}
        path, accept, check = "/v1/chat/completions", "*/*", _check_openai
    else:
        fields = {"prompt": text, "max_new_tokens": max_tokens + 8}
        path = "/worker_generate_stream"
        llava = dialect < 0.2
        accept, check = ("*/*", _check_llava) if llava else ("text/event-stream", _check_sse)
    body = json.dumps({"model": "echo", **fields}).encode()
    return Exchange(_post(path, body, accept), lambda status, data: check(status, data, text))


def bad_exchange(rng: random.Random) -> Exchange:
    """A request that must be refused."""
    body, status = rng.choice(
        (
            (b'{"model": "echo", "prompt": "a', 422),
            (b"[1, 2]", 422),
            (b'{"model": "echo"}', 422),
            (b'{"model": "echo", "prompt": "a <image>"}', 422),
            (b'{"model": "no-such-model", "prompt": "a"}', 404),
            (b'{"model": "echo", "prompt": "%b"}' % (b"a" * 9000), 413),
        )
    )
    request = _post("/worker_generate_stream", body, "text/event-stream")
    return Exchange(request, lambda got, data: _check_refusal(got, data, status))


def _check_refusal(status: int, body: bytes, expected: int) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return "wrong"
    return "bad_ok" if status == expected and error["code"] and error["message"] else "wrong"


def _check_status(status: int) -> str | None:
    if status in (429, 503):
        return "refused"
    return None if status == 200 else "wrong"


def _check_sse(status: int, body: bytes, text: str) -> str:
    if refused := _check_status(status):
        return refused
    answer, ids, terminal = "", list[int](), None
    for frame in body.decode().split("\n\n")[:-1]:
        if terminal is not None:
            return "duplicated"
        name, _, data = frame.partition("\ndata: ")
        event = json.loads(data)
        if name != f"event: {event['type']}":
            return "wrong"
        if event["type"] == "delta":
            answer += event["text"]
            ids += event["token_ids"]
        else:
            terminal = event
    if terminal is None or not body.endswith(b"\n\n"):
        return "cut"
    if terminal["type"] == "failed":
        return "failed"
    expected = [*text.encode(), _END]
    whole = answer == text and ids == expected and terminal["reason"] == "stop"
    return "ok" if whole and terminal["completion_tokens"] == len(expected) else "wrong"


def _check_openai(status: int, body: bytes, text: str) -> str:
    if refused := _check_status(status):
        return refused
    *frames, rest = body.decode().split("\n\n")
    answer, reasons, done = "", [], False
    for frame in frames:
        if done:
            return "duplicated"
        data = frame.removeprefix("data: ")
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            return "failed"
        choice = chunk["choices"][0]
        answer += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons.append(choice["finish_reason"])
    if not done or not reasons or rest:
        return "cut"
    if len(reasons) > 1:
        return "duplicated"
    return "ok" if answer == text and reasons == ["stop"] else "wrong"


def _check_llava(status: int, body: bytes, text: str) -> str:
    if refused := _check_status(status):
        return refused
    *frames, rest = body.split(b"\0")
    so_far, finished = text, False  # LLaVA's frames repeat the prompt
    for frame in frames:
        if finished:
            return "duplicated"
        fields = json.loads(frame)
        if fields["error_code"]:
            return "failed"
        if not fields["text"].startswith(so_far):
            return "wrong"
        so_far = fields["text"]
        finished = fields["finish_reason"] is not None
    if not finished or rest:
        return "cut"
    return "ok" if so_far == text * 2 and fields["finish_reason"] == "stop" else "wrong"
