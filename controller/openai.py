"""OpenAI's chat completions, translated to and from our messages.

Format: https://platform.openai.com/docs/api-reference/chat. Unknown fields are refused by name
(law L7): a misspelt ``max_token`` must not be ignored.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from protocol.errors import Unsupported
from protocol.events import (
    FRAME_END,
    Delta,
    Failed,
    Finished,
    SseDecoder,
    decode_sse_frame,
    delta_text,
)
from protocol.messages import ChatMessage, ContentPart, ImagePart, TextPart
from transport.asgi import LastChunk


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Url(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _Url


class _Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[Annotated[_Text | _Image, Field(discriminator="type")], ...]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False


class ChatCompletionRequest(_Strict):
    """The fields of ``POST /v1/chat/completions`` that are served, and our extras."""

    model: str
    messages: tuple[_Turn, ...] = Field(min_length=1)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    n: Literal[1] = 1
    user: str | None = None
    # extras
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    adapter: str | None = None
    kind: str | None = None

    def as_fields(self) -> dict[str, Any]:
        """The fields of the ``GenerateRequest`` this asks for.

        Raises:
            Unsupported: an image is an address; only data URIs are taken.
        """
        images: list[str] = []
        messages = [_turn(turn, images) for turn in self.messages]
        fields: dict[str, Any] = self.model_dump(
            include={
                "model",
                "temperature",
                "top_p",
                "stop",
                "seed",
                "top_k",
                "min_p",
                "repetition_penalty",
                "adapter",
                "kind",
            },
            exclude_none=True,
        )
        limit = self.max_completion_tokens or self.max_tokens
        if limit is not None:
            fields["max_new_tokens"] = limit
        return fields | {"messages": messages, "images": images}


def _turn(turn: _Turn, images: list[str]) -> ChatMessage:
    role: Any = "system" if turn.role == "developer" else turn.role
    if isinstance(turn.content, str):
        return ChatMessage(role=role, content=turn.content)
    parts: list[ContentPart] = []
    for part in turn.content:
        if isinstance(part, _Text):
            parts.append(TextPart(text=part.text))
        elif part.image_url.url.startswith("data:"):
            images.append(part.image_url.url)
            parts.append(ImagePart())
        else:
            raise Unsupported(
                "Images are taken as data URIs only; this server fetches no addresses.",
                remedy="Send data:image/png;base64,... in image_url.url.",
            )
    return ChatMessage(role=role, content=tuple(parts))


class Completion:
    """One answer in OpenAI's shape, streamed or whole."""

    def __init__(self, request: ChatCompletionRequest, request_id: str) -> None:
        self._include_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "created": int(time.time()),
            "model": request.model,
        }

    async def chunks(self, frames: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """Our SSE frames as ``chat.completion.chunk`` ones, ended by ``[DONE]`` or an error."""
        # Built once, as only the text differs from token to token.
        before, _, after = self._chunk({"content": "\0"}, None).rpartition(orjson.dumps("\0"))
        role = {"role": "assistant"}
        async with aclosing(frames):
            async for data in frames:
                out = b""
                for frame in data.split(FRAME_END)[:-1]:
                    text = delta_text(frame)
                    if text is None:
                        out += self._end(frame, role)
                    elif role:
                        out += self._chunk(role | {"content": text}, None)
                        role = {}
                    elif text:
                        out += before + orjson.dumps(text) + after
                if out:
                    yield LastChunk(out) if isinstance(data, LastChunk) else out

    def _end(self, frame: bytes, role: dict[str, str]) -> bytes:
        """The terminal event in OpenAI's words."""
        event = decode_sse_frame(frame)
        if isinstance(event, Failed):
            return _sse(event.error().body())
        if not isinstance(event, Finished):
            return b""
        out = self._chunk(role, event.reason)
        if self._include_usage:
            out += _sse(self._object([], "chat.completion.chunk") | _usage(event))
        return out + b"data: [DONE]\n\n"

    async def whole(self, frames: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """The complete ``chat.completion`` object, in one piece.

        Raises:
            TandemError: the answer failed.
        """
        decoder = SseDecoder()
        text: list[str] = []
        async with aclosing(frames):
            async for data in frames:
                for event in decoder.feed(data):
                    if isinstance(event, Delta):
                        text.append(event.text)
                    elif isinstance(event, Failed):
                        raise event.error()
                    else:
                        choice = {
                            "index": 0,
                            "message": {"role": "assistant", "content": "".join(text)},
                            "finish_reason": event.reason,
                        }
                        whole = self._object([choice], "chat.completion") | _usage(event)
                        yield orjson.dumps(whole)

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _sse(self._object([choice], "chat.completion.chunk"))

    def _object(self, choices: list[dict[str, Any]], name: str) -> dict[str, Any]:
        return {**self._head, "object": name, "choices": choices}


def _usage(event: Finished) -> dict[str, Any]:
    return {
        "usage": {
            "prompt_tokens": event.prompt_tokens,
            "completion_tokens": event.completion_tokens,
            "total_tokens": event.prompt_tokens + event.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": event.cached_tokens},
        }
    }


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(data)
