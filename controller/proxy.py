"""The one place that opens an upstream stream.

What comes out is always the same: whole SSE frames of our events, as bytes. A worker of ours
already speaks that, so its bytes are passed on as they are, checked with two searches a chunk;
LLaVA's and FastChat's NUL-delimited frames are translated. A frame is never cut: when the worker
dies inside one, the part that came is dropped.
"""

from __future__ import annotations

from collections import deque

import orjson

from controller import foreign
from controller.registry import Replica
from protocol.errors import TandemError, UpstreamLost, from_wire
from protocol.events import (
    DELTA_PREFIX,
    FRAME_END,
    SSE_MEDIA_TYPE,
    Delta,
    NulDecoder,
    Terminal,
    decode_sse_frame,
    encode_sse,
)
from protocol.messages import GenerateRequest
from transport.asgi import REQUEST_ID_HEADER
from transport.client import Headers, HttpPool, Upstream

PATH = "/worker_generate_stream"

_MAX_FRAME_BYTES = 4 << 20  # more than that without an end is not a stream of events


class Relay:
    """One upstream stream: ``open`` it, ``read`` until ``terminal`` is set, always ``close`` it."""

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
        self._timeout_s = first_event_timeout_s
        self._event_timeout_s = event_timeout_s
        self._upstream: Upstream | None = None
        self._foreign: NulDecoder | None = None  # of a worker that speaks LLaVA's framing
        self._rest = b""  # the beginning of a frame whose end has not come yet
        self._queue: deque[bytes] = deque()  # frames to be looked at one by one
        self.terminal: Terminal | None = None

    async def open(
        self, request: GenerateRequest, body: bytes, request_id: str, context: Headers = ()
    ) -> None:
        """Send the request, which is ``body`` as JSON; return when the worker has accepted it.
        ``context`` is its trace's.

        Raises:
            TandemError: the worker refuses.
            UpstreamLost: it cannot be reached, or hangs up.
            DeadlineExceeded: it does not answer in time.
        """
        status = self._replica.status
        self._upstream = await self._pool.open(
            self._replica.address,
            PATH,
            foreign.body_of(request, body) if foreign.is_foreign(status) else body,
            (
                (b"accept", SSE_MEDIA_TYPE.encode()),
                (REQUEST_ID_HEADER, request_id.encode()),
                *context,
            ),
            timeout_s=self._timeout_s,
        )
        if self._upstream.status != 200:
            raise await self._refusal(self._upstream)
        if not self._upstream.headers.get(b"content-type", b"").startswith(SSE_MEDIA_TYPE.encode()):
            self._foreign = NulDecoder(foreign.echoed(request, status), request.stop)

    async def read(self) -> bytes:
        """Whole SSE frames, as many as are there; ``terminal`` is set with the last one.

        Raises:
            UpstreamLost: the stream ended without a terminal event (L1), or is none.
            DeadlineExceeded: the first event, or a later one, took too long.
        """
        assert self._upstream is not None
        while True:
            while self._queue:
                frame = self._queue.popleft()
                if (event := decode_sse_frame(frame)) is not None:  # else a comment
                    if not isinstance(event, Delta):
                        self.terminal = event
                    return frame + FRAME_END
            received = await self._upstream.read(self._timeout_s)
            self._timeout_s = self._event_timeout_s
            data = received if self._foreign is None else self._translated(received)
            if data and (data := self._whole(data)):
                # JSON escapes line breaks, so these cannot match inside an event.
                if data.startswith(DELTA_PREFIX) and not (
                    b"\n\nevent: f" in data or b"\n\n:" in data or b"\n\ndata" in data
                ):
                    return data
                self._queue.extend(data.split(FRAME_END)[:-1])
            elif not received:
                raise UpstreamLost(
                    f"{self._replica.worker_id} ended its stream without a last word."
                )

    def close(self) -> None:
        """Give the connection back, or cut it if the worker is still sending; repeatable."""
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def _whole(self, data: bytes) -> bytes:
        """The frames that are complete with ``data``; the rest is kept for later."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not data.endswith(FRAME_END):
            end = data.rfind(FRAME_END) + len(FRAME_END) if FRAME_END in data else 0
            data, self._rest = data[:end], data[end:]
            if len(self._rest) > _MAX_FRAME_BYTES:
                raise UpstreamLost(f"{self._replica.worker_id} sent a frame without end.")
        return data

    def _translated(self, received: bytes) -> bytes:
        """LLaVA's or FastChat's frames as ours."""
        assert self._foreign is not None
        events = self._foreign.feed(received) if received else self._foreign.end()
        return b"".join(encode_sse(event) for event in events)

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
