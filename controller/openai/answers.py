"""Our events as OpenAI's answers, streamed or whole.

Formats: https://platform.openai.com/docs/api-reference/chat/object, .../chat/streaming and
.../completions/object.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Any, Protocol

import orjson

from controller.openai.merge import merged
from controller.openai.requests import ChatCompletionRequest, CompletionRequest
from protocol.errors import TandemError
from protocol.events import (
    FRAME_END,
    Delta,
    Failed,
    Finished,
    TokenLogprob,
    decode_sse_frame,
    delta_text,
)
from transport.asgi import LastChunk

Logprobs = Sequence[TokenLogprob]


class Wire(Protocol):
    """How one of OpenAI's two routes writes an answer."""

    prefix: str  # of the id
    chunk: str  # the object's name, streamed
    whole: str  # and whole

    def piece(self, text: str | None, *, first: bool = False) -> dict[str, Any]:
        """The part of a choice that holds new text; ``None``: there is none."""
        ...

    def complete(self, text: str) -> dict[str, Any]:
        """The part of a choice that holds the whole text."""
        ...

    def logprobs(self, tokens: Logprobs, offset: int) -> dict[str, Any]:
        """Of tokens whose text begins ``offset`` characters into the answer."""
        ...


class Chat:
    """``/v1/chat/completions``."""

    prefix = "chatcmpl-"
    chunk = "chat.completion.chunk"
    whole = "chat.completion"

    def piece(self, text: str | None, *, first: bool = False) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        return {"delta": role if text is None else role | {"content": text}}

    def complete(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, tokens: Logprobs, offset: int) -> dict[str, Any]:
        content = [
            _token(token.token, token.logprob)
            | {"top_logprobs": [_token(top.token, top.logprob) for top in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    partial = "\ufffd" in text  # a piece of a character: its bytes are not known here
    return {"token": text, "logprob": logprob, "bytes": None if partial else list(text.encode())}


class Text:
    """``/v1/completions``."""

    prefix = "cmpl-"
    chunk = whole = "text_completion"

    def piece(self, text: str | None, *, first: bool = False) -> dict[str, Any]:
        return {"text": text or ""}

    def complete(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, tokens: Logprobs, offset: int) -> dict[str, Any]:
        lengths = accumulate((len(token.token) for token in tokens), initial=offset)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{top.token: top.logprob for top in token.top} for token in tokens],
            "text_offset": list(lengths)[:-1],
        }


class Answer:
    """The answer to one request: as many choices as it asked for, each from a stream of ours."""

    def __init__(self, asked: ChatCompletionRequest | CompletionRequest, request_id: str) -> None:
        self._asked = asked
        self._wire: Wire = Chat() if isinstance(asked, ChatCompletionRequest) else Text()
        self._head = {
            "id": self._wire.prefix + request_id,
            "created": int(time.time()),
            "model": asked.model,
        }

    async def chunks(self, streams: Sequence[AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
        """Our SSE frames as OpenAI's chunks, ended by ``[DONE]`` or by an error.

        Raises:
            TandemError: before the first chunk only.
        """
        choices = [_Streamed(self, index, echo) for index, echo in enumerate(self._asked.echoes)]
        if len(streams) == 1:  # without the tasks that several need
            (choice,) = choices
            async with aclosing(streams[0]) as frames:
                async for data in frames:
                    if out := choice.feed(data):
                        last = isinstance(data, LastChunk)
                        yield LastChunk(out + self._tail(choices)) if last else out
            return
        started = False
        try:
            async with aclosing(merged(streams)) as pieces:
                async for index, data in pieces:
                    if out := choices[index].feed(data):
                        started = True
                        yield out
                    if isinstance(choices[index].terminal, Failed):
                        yield LastChunk(b"")
                        return
            yield LastChunk(self._tail(choices))
        except TandemError as error:
            if not started:
                raise
            yield LastChunk(sse(error.body()))

    async def whole(self, streams: Sequence[AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
        """The complete object, in one piece.

        Raises:
            TandemError: one of the answers failed.
        """
        choices = [_Whole(self, index, echo) for index, echo in enumerate(self._asked.echoes)]
        async with aclosing(merged(streams)) as pieces:
            async for index, data in pieces:
                choices[index].feed(data)
        body = self.object([choice.choice() for choice in choices], self._wire.whole)
        yield orjson.dumps(body | {"usage": self._usage(choices)})

    # ---- what the choices use

    @property
    def wire(self) -> Wire:
        return self._wire

    @property
    def wants_logprobs(self) -> bool:
        return self._asked.wants_logprobs

    def object(self, choices: list[dict[str, Any]], name: str) -> dict[str, Any]:
        return {**self._head, "object": name, "choices": choices}

    def chunk(self, choice: dict[str, Any]) -> bytes:
        body = self.object([choice], self._wire.chunk)
        return sse(body | {"usage": None} if self._asked.include_usage else body)

    # ---- inside

    def _tail(self, choices: Sequence[_Streamed]) -> bytes:
        """What follows the last choice's end; nothing follows a failure."""
        if any(isinstance(choice.terminal, Failed) for choice in choices):
            return b""
        done = b"data: [DONE]\n\n"
        if not self._asked.include_usage:
            return done
        return sse(self.object([], self._wire.chunk) | {"usage": self._usage(choices)}) + done

    def _usage(self, choices: Sequence[_Streamed] | Sequence[_Whole]) -> dict[str, Any]:
        """Tokens of all; the prompt of several choices is one."""
        ended = [c.terminal for c in choices if isinstance(c.terminal, Finished)]
        prompts = ended[:: self._asked.choices]
        prompt_tokens = sum(event.prompt_tokens for event in prompts)
        completion_tokens = sum(event.completion_tokens for event in ended)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(e.cached_tokens for e in prompts)},
        }


class _Streamed:
    """One choice of a streamed answer: frames in, chunks out."""

    def __init__(self, answer: Answer, index: int, echo: str) -> None:
        self._answer = answer
        self._index = index
        self._echo = echo
        self._begun = False
        self._chars = 0
        self.terminal: Finished | Failed | None = None
        # Built once, as only the text differs from token to token.
        template = answer.chunk(self._choice(answer.wire.piece("\0")))
        self._before, _, self._after = template.rpartition(orjson.dumps("\0"))

    def feed(self, data: bytes) -> bytes:
        """The chunks for whole frames of ours."""
        out = b""
        for frame in data.split(FRAME_END)[:-1]:
            text = None if self._answer.wants_logprobs else delta_text(frame)
            if text is None:
                out += self._decoded(frame)
            elif not self._begun:
                out += self._first(text, {})
            elif text:
                out += self._before + orjson.dumps(text) + self._after
        return out

    def _decoded(self, frame: bytes) -> bytes:
        event = decode_sse_frame(frame)
        if isinstance(event, Delta):
            return self._delta(event)
        self.terminal = event
        if isinstance(event, Failed):
            return sse(event.error().body())
        if event is None:
            return b""
        out = b"" if self._begun else self._first("", {})
        return out + self._answer.chunk(
            self._choice(self._answer.wire.piece(None), finish_reason=event.reason)
        )

    def _delta(self, event: Delta) -> bytes:
        extra: dict[str, Any] = {}
        if event.logprobs is not None:
            extra["logprobs"] = self._answer.wire.logprobs(event.logprobs, self._chars)
            self._chars += sum(len(token.token) for token in event.logprobs)
        if not self._begun:
            return self._first(event.text, extra)
        if not event.text and not event.token_ids:
            return b""
        return self._answer.chunk(self._choice(self._answer.wire.piece(event.text)) | extra)

    def _first(self, text: str, extra: dict[str, Any]) -> bytes:
        self._begun = True
        piece = self._answer.wire.piece(self._echo + text, first=True)
        return self._answer.chunk(self._choice(piece) | extra)

    def _choice(self, piece: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {
            "index": self._index,
            **piece,
            "logprobs": None,
            "finish_reason": finish_reason,
        }


class _Whole:
    """One choice of a whole answer."""

    def __init__(self, answer: Answer, index: int, echo: str) -> None:
        self._answer = answer
        self._index = index
        self._texts = [echo]
        self._logprobs: list[TokenLogprob] = []
        self.terminal: Finished | None = None

    def feed(self, data: bytes) -> None:
        """Take whole frames of ours.

        Raises:
            TandemError: one of them is a failure.
        """
        for frame in data.split(FRAME_END)[:-1]:
            event = decode_sse_frame(frame)
            if isinstance(event, Delta):
                self._texts.append(event.text)
                self._logprobs += event.logprobs or ()
            elif isinstance(event, Failed):
                raise event.error()
            else:
                self.terminal = event

    def choice(self) -> dict[str, Any]:
        wire = self._answer.wire
        asked = self._answer.wants_logprobs
        return {
            "index": self._index,
            **wire.complete("".join(self._texts)),
            "logprobs": wire.logprobs(self._logprobs, 0) if asked else None,
            "finish_reason": self.terminal.reason if self.terminal else None,
        }


def sse(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(data)
