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
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import InvalidRequest, TandemError
from protocol.events import SSE_MEDIA_TYPE

REQUEST_ID_HEADER = b"x-request-id"

_NO_SUCH_FIELD = "there is no such field here"

M = TypeVar("M", bound=BaseModel)
Headers = Iterable[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def accepts_sse(scope: Scope) -> bool:
    """Whether the client asked for SSE; otherwise it gets LLaVA's NUL-delimited frames."""
    return SSE_MEDIA_TYPE.encode() in (header(scope, b"accept") or b"")


def request_id(scope: Scope) -> str:
    """The client's ``X-Request-Id`` if it is printable ASCII of sane length, else a new one."""
    given = (header(scope, REQUEST_ID_HEADER) or b"").decode("ascii", "ignore")
    return given if 0 < len(given) <= 128 and given.isprintable() else uuid4().hex


def beside(app: ASGIApp, streams: Mapping[str, ASGIApp]) -> ASGIApp:
    """``app`` with POSTs to the paths of ``streams`` taken out before its middleware, which would
    cost every chunk several calls."""

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        await (streams.get(scope["path"], app) if posted else app)(scope, receive, send)

    return route


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        InvalidRequest: it is larger than ``limit_bytes``; refused from its declared length before
            it is read, or as soon as it grows too large.
        ClientLeft: the client went away while sending.
    """
    declared = header(scope, b"content-length") or b""
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(int(declared), limit_bytes)
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
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


def _too_large(size: int, limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"The body has {size} bytes or more; the limit is {limit}.",
        remedy="Send smaller or fewer images, or raise --max-body-bytes.",
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
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
            *headers,
        ],
    }


async def _cancel_on_disconnect(receive: Receive, scope: CancelScope) -> None:
    """Uvicorn tells of a client's leaving only to somebody who is receiving."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
