"""Answering streams: the raw ASGI endpoints of the controller and the workers are made of these.

FastAPI serves the control routes; per token its response machinery costs more than the relay.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from difflib import get_close_matches
from typing import Any, TypeVar
from uuid import uuid4

import orjson
from anyio import CancelScope
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MethodNotAllowed,
    TandemError,
    TooLarge,
)
from protocol.events import SSE_MEDIA_TYPE

REQUEST_ID_HEADER = b"x-request-id"

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
"""On every answer: it is data for whoever asked, never a page, and nobody else's to keep."""

CONTROL_BODY_BYTES = 1 << 20
"""The largest body of a route that FastAPI serves; it would read one of any size."""

BODY_PAUSE_S = 30.0
"""The longest silence of a client inside its request."""

_NO_SUCH_FIELD = "there is no such field here"

M = TypeVar("M", bound=BaseModel)
Headers = Iterable[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def accepts_sse(scope: Scope) -> bool:
    """Whether the client asked for SSE; otherwise it gets LLaVA's NUL-delimited frames."""
    return SSE_MEDIA_TYPE.encode() in (header(scope, b"accept") or b"")


def request_id(scope: Scope) -> str:
    """The client's ``X-Request-Id`` if it is printable ASCII of sane length, else a new one.

    The same at every call: it is kept in the request's state.
    """
    state: dict[str, Any] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = (header(scope, REQUEST_ID_HEADER) or b"").decode("ascii", "ignore")
        sane = 0 < len(given) <= 128 and given.isprintable()
        state["request_id"] = given if sane else uuid4().hex
    known: str = state["request_id"]
    return known


def id_header(request_id: str) -> tuple[bytes, bytes]:
    return (REQUEST_ID_HEADER, request_id.encode())


class Beside:
    """``app`` with the paths of ``streams``, which are POSTed to, taken out before its middleware:
    that would cost every chunk several calls."""

    def __init__(self, app: FastAPI, streams: Mapping[str, ASGIApp]) -> None:
        self.app = app
        self.streams = streams
        self._plain = _Plain(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self.streams.get(scope["path"]) if scope["type"] == "http" else None
        if stream is None:
            await self._plain(scope, receive, send)
        elif scope["method"] == "POST":
            await stream(scope, receive, send)
        else:
            error = MethodNotAllowed(f"{scope['path']} takes POST, not {scope['method']}.")
            headers = [(b"allow", b"POST"), id_header(request_id(scope))]
            await send_error(send, error, headers)


class _Plain:
    """FastAPI's routes with a limit to their bodies, and our headers on their answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = [id_header(request_id(scope)), *SECURITY_HEADERS]
        try:
            body = await read_body(scope, receive, limit_bytes=CONTROL_BODY_BYTES)
        except ClientLeft:
            return
        except TandemError as error:
            await send_error(send, error, own[:1])
            return
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = [(name, value) for name, value in own if name not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, replay, send_with_headers)


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        TooLarge: it is larger than ``limit_bytes``; refused from its declared length before it is
            read, or as soon as it grows too large.
        DeadlineExceeded: nothing more of it came for ``BODY_PAUSE_S``.
        ClientLeft: the client went away while sending.
    """
    declared = header(scope, b"content-length") or b""
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(int(declared), limit_bytes)
    pieces: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(BODY_PAUSE_S):
                message = await receive()
        except TimeoutError:
            raise DeadlineExceeded(
                f"Nothing more of the body has come for {BODY_PAUSE_S:g} s.",
                remedy="Send the whole body at once; its length may be declared wrongly.",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit_bytes:
            raise _too_large(size, limit_bytes)
        pieces.append(piece)
        if not message.get("more_body"):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class LastChunk(bytes):
    """The chunk after which nothing comes: it travels with the end of the body, in one write."""


class ClientLeft(Exception):
    """The client closed its connection; there is nobody to answer."""


def _too_large(size: int, limit: int) -> TooLarge:
    return TooLarge(
        f"The body has {size} bytes or more; the limit is {limit}.",
        remedy="Send smaller or fewer images, or have --max-body-bytes raised.",
    )


def parse(model: type[M], body: bytes) -> M:
    """Validate a JSON body.

    Raises:
        InvalidRequest: it is not JSON, or a field is wrong; the sentence names the field.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as exc:
        raise _invalid(model, exc) from exc


def validate(model: type[M], fields: Mapping[str, Any]) -> M:
    """Validate fields that are not JSON; raises as ``parse`` does."""
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        raise _invalid(model, exc) from exc


def _invalid(model: type[BaseModel], exc: ValidationError) -> InvalidRequest:
    return invalid_request(exc.errors(include_url=False, include_input=False), model.model_fields)


def invalid_request(
    errors: Sequence[Mapping[str, Any]], known: Iterable[str] = ()
) -> InvalidRequest:
    """Pydantic's findings as one sentence; at most three of them, without the client's values.

    ``known`` are the fields that one misspelt may have meant.
    """
    places = [
        ".".join(str(part) for part in error["loc"] if part not in ("body", "json"))
        for error in errors
    ]
    sentences = []
    for place, error in list(zip(places, errors, strict=True))[:3]:
        text = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            (near, *_) = [*get_close_matches(place, list(known), 1), ""]
            text = f"there is no such field here; is {near} meant?" if near else _NO_SUCH_FIELD
        sentences.append(f"{place}: {text}" if place else text)
    message = "; ".join(sentences)
    return InvalidRequest(
        message if message.endswith("?") else message + ".", param=places[0] or None
    )


async def send_json(send: Send, status: int, body: object, headers: Headers = ()) -> None:
    data = orjson.dumps(body)
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(data)),
            *SECURITY_HEADERS,
            *headers,
        ],
    }
    await send(start)
    await send({"type": "http.response.body", "body": data})


def retry_after(error: TandemError) -> list[tuple[bytes, bytes]]:
    """The ``Retry-After`` header of an error that has one, in whole seconds, at least 1."""
    if error.retry_after_s is None:
        return []
    return [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s)))]


async def send_error(send: Send, error: TandemError, headers: Headers = ()) -> None:
    """A refusal: HTTP status and JSON (law L3)."""
    await send_json(send, error.status, error.body(), [*retry_after(error), *headers])


async def respond(
    receive: Receive,
    send: Send,
    chunks: AsyncGenerator[bytes],
    *,
    media_type: str,
    headers: Headers = (),
) -> None:
    """Send ``chunks`` as they come; call it after the body has been read.

    A ``TandemError`` before the first chunk becomes a refusal; after it, ``chunks`` itself has to
    end the stream, best with a ``LastChunk``. A client that leaves cancels ``chunks``, waiting or
    streaming, and the generator has been closed when this returns.
    """
    # No task group: it would wrap a typed refusal into an ExceptionGroup.
    with CancelScope() as scope:
        watcher = asyncio.ensure_future(_cancel_on_disconnect(receive, scope))
        started = ended = False
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if not started:
                        started = True
                        await send(_start(media_type, headers))
                    ended = isinstance(chunk, LastChunk)
                    message = {"type": "http.response.body", "body": chunk, "more_body": not ended}
                    await send(message)
                    if ended:
                        break
            if not ended:
                if not started:
                    await send(_start(media_type, headers))
                await send({"type": "http.response.body", "body": b""})
        except TandemError as error:
            if started:
                raise
            await send_error(send, error, headers)
        finally:
            watcher.cancel()


def _start(media_type: str, headers: Headers) -> Message:
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (b"content-type", media_type.encode()),
            *SECURITY_HEADERS,
            (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
            *headers,
        ],
    }


async def _cancel_on_disconnect(receive: Receive, scope: CancelScope) -> None:
    """Uvicorn tells of a client's leaving only to somebody who is receiving."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
