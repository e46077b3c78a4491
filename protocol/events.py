r"""The event stream of one generation, and its two framings.

A stream is ``Delta* (Finished | Failed)`` with nothing after it (law L1).

*SSE* (``Accept: text/event-stream``): one event a frame, named by its type ::

    event: delta
    data: {"type":"delta","text":"The","token_ids":[464]}

*NUL-delimited cumulative JSON* (anything else): LLaVA's wire, each frame the prompt and the
whole answer so far. LLaVA has no terminal message, so ours is a frame whose ``finish_reason`` is
set (FastChat's convention) or whose ``error_code`` is not 0 ::

    {"text": "<prompt>The circle", "error_code": 0, "finish_reason": null}\0

A request with ``logprobs`` gets, in both framings, one ``TokenLogprob`` for each token id of a
delta; without it a delta has no such field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from protocol.errors import TandemError, UpstreamLost, from_wire
from protocol.messages import Message

SSE_MEDIA_TYPE = "text/event-stream"
NUL_MEDIA_TYPE = "application/octet-stream"


LOWEST_LOGPROB = -9999.0
"""OpenAI's word for "very unlikely"; JSON has no minus infinity."""

# In this order NaN, which is larger than nothing, becomes the lowest too.
Logprob = Annotated[float, AfterValidator(lambda value: max(LOWEST_LOGPROB, value))]


class TopLogprob(Message):
    """One of the likeliest tokens at a place."""

    token_id: int
    token: str
    logprob: Logprob


class TokenLogprob(Message):
    """How likely the model found the token it was given.

    ``token`` is the token's own text, U+FFFD where it is no whole character. ``logprob`` is the
    natural logarithm of its probability in the model's own distribution: before temperature,
    penalties and grammar. ``top`` are the likeliest tokens there, best first, as many as
    ``logprobs`` asked for; the chosen one need not be among them.
    """

    token_id: int
    token: str
    logprob: Logprob
    top: tuple[TopLogprob, ...] = ()


class Delta(Message):
    """New text (never half a character) and the new token ids it came from.

    ``text`` may be empty while a character or a possible stop string is incomplete. ``logprobs``
    has one element for each of ``token_ids``, or is ``None``.
    """

    type: Literal["delta"] = "delta"
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None


class Finished(Message):
    """The answer is complete. ``completion_tokens`` counts resumed tokens too.

    ``cached_tokens`` of ``prompt_tokens`` were not computed again, thanks to the prefix cache.
    """

    type: Literal["finished"] = "finished"
    reason: Literal["stop", "length"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Failed(Message):
    """The answer ends here, unfinished, and this is why."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    remedy: str = ""

    @classmethod
    def of(cls, error: TandemError) -> Failed:
        return cls(code=error.code, message=error.message, remedy=error.remedy)

    def error(self) -> TandemError:
        return from_wire(self.code, self.message, self.remedy)


Event = Delta | Finished | Failed
Terminal = Finished | Failed
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])
_LOGPROBS: TypeAdapter[tuple[TokenLogprob, ...]] = TypeAdapter(tuple[TokenLogprob, ...])


def is_terminal(event: Event) -> bool:
    return not isinstance(event, Delta)


# ---------------------------------------------------------------- SSE

DELTA_PREFIX = b"event: delta\n"
FRAME_END = b"\n\n"
_DELTA_DATA = DELTA_PREFIX + b"data: "


def encode_sse(event: Event) -> bytes:
    """One SSE frame. JSON escapes line breaks, so a frame has exactly two lines."""
    data = event.model_dump(exclude_none=True)
    return b"event: %b\ndata: %b\n\n" % (event.type.encode(), orjson.dumps(data))


def decode_sse_frame(frame: bytes) -> Event | None:
    """The event of one frame without its blank line; ``None`` for a comment.

    Raises:
        UpstreamLost: the frame is not one of ours.
    """
    data = b"\n".join(
        line[5:].removeprefix(b" ")
        for line in frame.replace(b"\r\n", b"\n").split(b"\n")
        if line.startswith(b"data:")
    )
    if not data:
        return None
    try:
        return _EVENT.validate_json(data)
    except ValidationError as exc:
        raise UpstreamLost("the worker sent an event that cannot be read") from exc


def delta_text(frame: bytes) -> str | None:
    """The text of a delta's frame without its blank line, ``None`` for any other frame.

    A translator of deltas needs nothing else, and this costs a third of ``decode_sse_frame``.

    Raises:
        UpstreamLost: the frame is not one of ours.
    """
    if not frame.startswith(_DELTA_DATA):
        return None
    try:
        text = orjson.loads(frame[len(_DELTA_DATA) :])["text"]
    except (orjson.JSONDecodeError, TypeError, KeyError) as exc:
        raise UpstreamLost("the worker sent an event that cannot be read") from exc
    return str(text)


class SseDecoder:
    """Bytes, split anywhere, to events."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[Event]:
        """The events completed by ``data``.

        Raises:
            UpstreamLost: a frame is not one of ours.
        """
        *frames, self._buffer = (self._buffer + data).split(FRAME_END)
        events = (decode_sse_frame(frame) for frame in frames)
        return [event for event in events if event is not None]

    @property
    def pending(self) -> bool:
        """True while part of a frame is held back."""
        return bool(self._buffer)


# ---------------------------------------------------------------- NUL-delimited cumulative JSON


class NulEncoder:
    """Events to LLaVA's frames; holds the prompt and the answer so far."""

    def __init__(self, prompt: str) -> None:
        self._text = prompt

    def encode(self, event: Event) -> bytes:
        frame: dict[str, Any] = {"text": self._text, "error_code": 0, "finish_reason": None}
        if isinstance(event, Delta):
            self._text += event.text
            frame |= {"text": self._text, "token_ids": event.token_ids}
            if event.logprobs is not None:
                frame["logprobs"] = _LOGPROBS.dump_python(event.logprobs)
        elif isinstance(event, Finished):
            frame["finish_reason"] = event.reason
            frame["usage"] = {
                "prompt_tokens": event.prompt_tokens,
                "completion_tokens": event.completion_tokens,
                "total_tokens": event.prompt_tokens + event.completion_tokens,
                "cached_tokens": event.cached_tokens,
            }
        else:
            # LLaVA's clients show ``text`` in place of the answer, so it holds the sentence.
            frame |= event.error().body() | {"finish_reason": "error", "partial": self._text}
        return orjson.dumps(frame) + b"\0"


_CODES = {
    2: "no_replica",  # LLaVA's controller; the next one, too
    3: "upstream_lost",
    40303: "context_overflow",  # FastChat's
    42901: "rate_limited",
    42903: "overloaded",
    50002: "out_of_memory",
    50005: "no_replica",
    50006: "upstream_lost",
}
"""Error codes of others that say as much as one of ours."""


class NulDecoder:
    """Bytes of LLaVA's, FastChat's or our own cumulative frames, split anywhere, to events.

    A text that contains one of ``stops`` ends there, whatever its worker makes of it.
    """

    def __init__(self, prompt: str, stops: tuple[str, ...] = ()) -> None:
        self._buffer = b""
        self._prompt = prompt
        self._stops = stops
        self._echoed: str | None = None  # what comes before the answer; None before a frame
        self._answer = ""  # as far as it came
        self._sent = ""  # as far as it was passed on
        self._names_its_end = False  # this worker sends finish_reason: its silence is a loss
        self._done = False

    def feed(self, data: bytes) -> list[Event]:
        """The events completed by ``data``; nothing after a terminal event.

        Raises:
            UpstreamLost: a frame is not one of LLaVA's, or takes text back.
        """
        *frames, self._buffer = (self._buffer + data).split(b"\0")
        events: list[Event] = []
        for frame in frames:
            if frame and not self._done:
                events += self._decode(frame)
        return events

    def end(self) -> list[Event]:
        """The events due when the body ended cleanly: a LLaVA worker says "done" only so."""
        if self._done or self._names_its_end or self._buffer or self._echoed is None:
            return []
        self._done = True
        return [*self._pass_on(self._answer), Finished(reason="stop")]

    def _decode(self, frame: bytes) -> list[Event]:
        try:
            fields = orjson.loads(frame)
            text = fields["text"]
            error_code = int(fields.get("error_code") or 0)
            finish_reason = fields.get("finish_reason")
            token_ids = tuple(fields.get("token_ids") or ())
            usage = fields.get("usage") or {}
            logprobs = fields.get("logprobs")
            # FastChat's are an object of lists in step; nothing here reads those.
            listed = _LOGPROBS.validate_python(logprobs) if isinstance(logprobs, list) else None
        except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError, ValueError) as exc:
            raise UpstreamLost("the worker sent a frame that is not LLaVA's JSON") from exc
        self._names_its_end |= "finish_reason" in fields
        if error_code:
            self._done = True
            return [_failed(fields, error_code)]
        if not isinstance(text, str):
            raise UpstreamLost("the worker sent a frame without text")
        if self._echoed is None:  # LLaVA echoes the prompt, FastChat need not
            self._echoed = self._prompt if text.startswith(self._prompt) else ""
        if not text.startswith(self._echoed + self._sent):
            raise UpstreamLost("the worker took back text it had already sent")
        answer, stopped = _cut(text[len(self._echoed) :], self._stops)
        self._answer = answer
        if not finish_reason and not stopped:
            answer = _settled(answer, self._stops, tidied="usage" in fields and not token_ids)
        events = self._pass_on(answer, token_ids, listed)
        if finish_reason or stopped:
            self._done = True
            events.append(
                Finished(
                    reason="length" if finish_reason == "length" and not stopped else "stop",
                    prompt_tokens=usage.get("prompt_tokens", 0),
                    completion_tokens=usage.get("completion_tokens", 0),
                    cached_tokens=usage.get("cached_tokens", 0),
                )
            )
        return events

    def _pass_on(
        self,
        answer: str,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> list[Event]:
        """What is new in ``answer``, if anything is."""
        new = answer[len(self._sent) :]
        if not new and not token_ids:
            return []
        self._sent += new
        return [Delta(text=new, token_ids=token_ids, logprobs=logprobs)]


def _failed(fields: dict[str, Any], error_code: int) -> Failed:
    error = fields.get("error") or {}
    text = fields["text"] or "The worker reported an error."
    return Failed(
        code=error.get("code", _CODES.get(error_code, "engine_failed")),
        message=error.get("message", text),
        remedy=error.get("remedy", "Look into the worker's log; it names the cause."),
    )


def _cut(answer: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """``answer`` up to the first of ``stops``, and whether there is one."""
    found = [at for at in map(answer.find, stops) if at >= 0]
    return (answer[: min(found)], True) if found else (answer, False)


def _settled(answer: str, stops: tuple[str, ...], *, tidied: bool) -> str:
    """``answer`` without the end that its worker may yet take back: half a character, the
    beginning of a stop string and, where FastChat tidies up spaces, those."""
    answer = answer.rstrip("\ufffd")
    if tidied:
        answer = answer.rstrip()
    longest = max(map(len, stops), default=0)
    for size in range(min(longest - 1, len(answer)), 0, -1):
        if any(stop.startswith(answer[-size:]) for stop in stops):
            return answer[:-size]
    return answer
