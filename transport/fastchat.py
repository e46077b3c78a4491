"""What FastChat's clients want other than LLaVA's: answers in one piece, and no HTTP statuses."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from protocol.errors import TandemError
from protocol.events import Delta, Event, Failed, NulEncoder, TokenLogprob
from transport.asgi import LastChunk

_ECHO = re.compile(rb'"echo"\s*:')  # within a string its quotes would have backslashes


def has_sent(body: bytes) -> bool:
    """Whether a request is FastChat's, readable or not: only it has this field."""
    return _ECHO.search(body) is not None


async def refusal(error: TandemError, *, whole: bool) -> AsyncGenerator[bytes]:
    """A refusal as its clients look for one: the only frame of a stream, or the whole answer."""
    frame = NulEncoder("").encode(Failed.of(error))
    yield LastChunk(frame.removesuffix(b"\0") if whole else frame)


async def failures_as_frames(chunks: AsyncGenerator[bytes], prompt: str) -> AsyncGenerator[bytes]:
    """``chunks``, with a refusal as one more frame: FastChat's servers look at no status, and
    take a body without a frame for an empty answer."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except TandemError as error:
        yield LastChunk(NulEncoder(prompt).encode(Failed.of(error)))


async def whole(events: AsyncGenerator[Event], prompt: str) -> AsyncGenerator[bytes]:
    """The answer of ``/worker_generate``: the last frame of a stream, which has everything."""
    text: list[str] = []
    logprobs: list[TokenLogprob] = []
    encoder = NulEncoder(prompt)
    frame = b""
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    text.append(event.text)
                    logprobs += event.logprobs or ()
                    continue
                encoder.encode(Delta(text="".join(text)))
                frame = encoder.encode(event)
    except TandemError as error:
        frame = encoder.encode(Failed.of(error))
    frame = frame.removesuffix(b"\0")
    if logprobs:
        frame = orjson.dumps(orjson.loads(frame) | {"logprobs": _in_step(logprobs)})
    yield LastChunk(frame)


def _in_step(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's older form, which FastChat passes on: lists with an element for each token."""
    offsets, at = [], 0
    for token in logprobs:
        offsets.append(at)
        at += len(token.token)
    return {
        "text_offset": offsets,
        "tokens": [token.token for token in logprobs],
        "token_logprobs": [token.logprob for token in logprobs],
        "top_logprobs": [{top.token: top.logprob for top in token.top} for token in logprobs],
    }
