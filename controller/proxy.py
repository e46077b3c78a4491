"""The one place that opens an upstream stream.

What comes out is always the same: whole SSE frames of our events, as bytes. A worker of ours
already speaks that, so its bytes are passed on as they are, checked with two searches a chunk;
LLaVA's and FastChat's NUL-delimited frames are translated. A frame is never cut: when the worker
dies inside one, the part that came is dropped.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson

from controller.registry import Replica
from protocol.errors import TandemError, UpstreamLost, from_wire
from protocol.events import (
    DELTA_PREFIX,
    FRAME_END,
    SSE_MEDIA_TYPE,
    Delta,
    Event,
    NulDecoder,
    Terminal,
    decode_sse_frame,
    encode_sse,
)
from transport.asgi import REQUEST_ID_HEADER
from transport.client import HttpPool, Upstream

PATH = "/worker_generate_stream"

_MAX_FRAME_BYTES = 4 << 20  # more than that without an end is not a stream of events


class Relay:
    """One upstream stream; ``terminal`` is its last event once ``frames`` has ended."""

    def __init__(
        self,
        pool: HttpPool,
        replica: Replica,
        *,
        first_event_timeout_s: float,
        event_timeout_s: float,
    ) -> None:
        self._pool = pool
        self._replica = replica
        self._first_event_timeout_s = first_event_timeout_s
        self._event_timeout_s = event_timeout_s
        self.terminal: Terminal | None = None

    async def frames(self, body: bytes, prompt: str, request_id: str) -> AsyncGenerator[bytes]:
        """Whole SSE frames, as many at once as are there; the last one holds the terminal event.

        Raises:
            TandemError: the worker refused (before the first frame only).
            UpstreamLost: it cannot be reached, or the stream ended without a terminal event (L1).
            DeadlineExceeded: the first event, or a later one, took too long.
        """
        upstream = await self._pool.open(
            self._replica.address,
            PATH,
            body,
            (
                (b"accept", SSE_MEDIA_TYPE.encode()),
                (REQUEST_ID_HEADER, request_id.encode()),
            ),
            timeout_s=self._first_event_timeout_s,
        )
        try:
            if upstream.status != 200:
                raise await self._refusal(upstream)
            media_type = upstream.headers.get(b"content-type", b"")
            translate = not media_type.startswith(SSE_MEDIA_TYPE.encode())
            pieces = self._translated(upstream, prompt) if translate else self._passed(upstream)
            async for frames in pieces:
                yield frames
                if self.terminal is not None:
                    return
        finally:
            upstream.close()

    async def _passed(self, upstream: Upstream) -> AsyncGenerator[bytes]:
        """Our own worker's frames."""
        rest = b""
        timeout_s = self._first_event_timeout_s
        while data := await upstream.read(timeout_s):
            timeout_s = self._event_timeout_s
            data = rest + data if rest else data
            if data.endswith(FRAME_END):
                rest = b""
            else:
                end = data.rfind(FRAME_END) + len(FRAME_END) if FRAME_END in data else 0
                data, rest = data[:end], data[end:]
                if len(rest) > _MAX_FRAME_BYTES:
                    raise UpstreamLost(f"{self._replica.worker_id} sent a frame without end.")
                if not data:
                    continue
            # JSON escapes line breaks, so this cannot match inside an event.
            if data.startswith(DELTA_PREFIX) and not (
                b"\n\nevent: f" in data or b"\n\n:" in data or b"\n\ndata" in data
            ):
                yield data
                continue
            for frame in data.split(FRAME_END)[:-1]:
                event = decode_sse_frame(frame)
                if event is not None:  # else a comment
                    self._note(event)
                    yield frame + FRAME_END
        if self.terminal is None:
            raise self._lost()

    async def _translated(self, upstream: Upstream, prompt: str) -> AsyncGenerator[bytes]:
        """LLaVA's or FastChat's frames."""
        decoder = NulDecoder(prompt)
        timeout_s = self._first_event_timeout_s
        more = True
        while more:
            data = await upstream.read(timeout_s)
            timeout_s = self._event_timeout_s
            more = bool(data)
            for event in decoder.feed(data) if data else decoder.end():
                self._note(event)
                yield encode_sse(event)
        if self.terminal is None:
            raise self._lost()

    def _note(self, event: Event) -> None:
        if not isinstance(event, Delta):
            self.terminal = event

    def _lost(self) -> UpstreamLost:
        return UpstreamLost(f"{self._replica.worker_id} ended its stream without a last word.")

    async def _refusal(self, upstream: Upstream) -> TandemError:
        """The worker's refusal as the typed error it was; anything else is a lost upstream."""
        body = await upstream.read_all(self._event_timeout_s)
        try:
            error = orjson.loads(body)["error"]
            return from_wire(
                error["code"], error["message"], error["remedy"], error.get("retry_after_s")
            )
        except (orjson.JSONDecodeError, TypeError, KeyError):
            return UpstreamLost(f"{self._replica.worker_id} answered {upstream.status}.")
