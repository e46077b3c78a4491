"""A streaming HTTP/1.1 client for POSTs: pooled, back-pressured, with no task per stream.

httpx costs three to four times the CPU per relayed token (PERF.md), and the token relay is where
the controller spends its time. Connections are ``asyncio.Protocol`` objects that feed httptools
and hand out the body as it comes, many chunks at once when many are there.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import httptools

from protocol.errors import DeadlineExceeded, UpstreamLost

Headers = Sequence[tuple[bytes, bytes]]

_PAUSE_AT_BYTES = 256 * 1024  # unread body at which the peer is asked to wait
_JOIN_BELOW_BYTES = 64 * 1024  # bodies this small travel in one write with their head


class Unreachable(UpstreamLost):
    """No connection could be made: nothing of the request has reached the peer."""


class Upstream(asyncio.Protocol):
    """One connection and the response on it. Made by ``HttpPool.open``; always ``close()`` it."""

    def __init__(self, pool: HttpPool, origin: str) -> None:
        self._pool = pool
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers = {}
        self._chunks: list[bytes] = []
        self._unread_bytes = 0
        self._paused = False
        self._complete = False
        self._keep_alive = False
        self._given_back = False
        self._lost: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wait_until = 0.0  # loop time at which the current wait is too long

    # ---- what the pool and the reader do

    async def start(self, request: list[bytes], timeout_s: float) -> None:
        """Send a request and wait for the head of its response.

        Raises:
            UpstreamLost: the connection ended before the head came.
            DeadlineExceeded: no head within ``timeout_s``.
        """
        self._reset()
        if self._transport is None or self._transport.is_closing():
            raise UpstreamLost(f"{self._origin} closed the connection.")
        for piece in request:
            self._transport.write(piece)
        while not self.status:
            await self._wait(timeout_s)

    async def read(self, timeout_s: float) -> bytes:
        """The next bytes of the body, all that are there; ``b""`` at its clean end.

        Raises:
            UpstreamLost: the connection ended inside the body.
            DeadlineExceeded: nothing came for ``timeout_s``.
        """
        while not self._chunks:
            if self._complete:
                return b""
            await self._wait(timeout_s)
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._unread_bytes = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def read_all(self, timeout_s: float, limit_bytes: int = 1 << 20) -> bytes:
        """The rest of a short body, cut at ``limit_bytes``; raises as ``read`` does."""
        body = b""
        while len(body) < limit_bytes and (data := await self.read(timeout_s)):
            body += data
        return body[:limit_bytes]

    def close(self) -> None:
        """Give the connection back if its response is complete, else abort it.

        Once given back it is not the caller's any more: a second call does nothing then.
        """
        if self._given_back:
            return
        if self._complete and self._keep_alive and not self._paused and self.usable:
            self._stop_timer()
            self._given_back = True
            self._pool._put(self, self._origin)
        else:
            self.abort()

    def abort(self) -> None:
        """Cut the connection, whatever its state."""
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def silent(self) -> bool:
        """True while nothing of the current response has arrived."""
        return not self.status and not self._chunks

    def _wait(self, timeout_s: float) -> asyncio.Future[None]:
        """To be awaited until something arrives. One timer serves the stream, not one a wait."""
        if self._lost is not None:
            raise self._lost
        self._waiter = self._loop.create_future()
        self._wait_until = self._loop.time() + timeout_s
        if self._timer is None or self._timer_at > self._wait_until:
            self._set_timer()
        return self._waiter

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._stop_timer()
        self._timer_at = self._wait_until
        self._timer = self._loop.call_at(self._timer_at, self._check_wait)

    def _check_wait(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() < self._wait_until:
            self._set_timer()
        else:
            self._waiter.set_exception(
                DeadlineExceeded(f"{self._origin} has sent nothing for too long.")
            )

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"{self._origin} does not speak HTTP: {exc}")
            if self._transport is not None:
                self._transport.abort()
            return
        if self._unread_bytes > _PAUSE_AT_BYTES and not self._paused and self._transport:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool._discard(self, self._origin)
        if not self._complete:
            self._fail(f"{self._origin} closed the connection before its answer was complete.")

    def _fail(self, sentence: str) -> None:
        if self._lost is None:
            self._lost = UpstreamLost(sentence)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._lost)

    # ---- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._unread_bytes += len(body)

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()


class HttpPool:
    """Connections to many origins, kept alive between requests."""

    def __init__(self, *, connect_timeout_s: float = 2.0, headers: Headers = ()) -> None:
        """``headers`` go with every request."""
        self._headers = tuple(headers)
        self._connect_timeout_s = connect_timeout_s
        self._idle: defaultdict[str, list[Upstream]] = defaultdict(list)

    async def open(
        self,
        base_url: str,
        path: str,
        body: bytes,
        headers: Headers = (),
        *,
        timeout_s: float,
    ) -> Upstream:
        """POST ``body`` and return when the head of the response has arrived.

        Raises:
            Unreachable: no connection can be made.
            UpstreamLost: it ended before a response came.
            DeadlineExceeded: no response within ``timeout_s``.
            ValueError: ``base_url`` is not ``http://host:port``.
        """
        request = _request(base_url, path, body, (*self._headers, *headers))
        if (upstream := self._take(base_url)) is not None:
            try:
                return await self._started(upstream, request, timeout_s)
            except UpstreamLost:
                # The peer may close an idle connection just as it is used again: not its failure.
                if not upstream.silent:
                    raise
        return await self._started(await self._connect(base_url), request, timeout_s)

    def close(self) -> None:
        """Close the idle connections; those in use are their readers' to close."""
        for upstreams in self._idle.values():
            for upstream in list(upstreams):
                upstream.abort()
        self._idle.clear()

    async def _started(
        self, upstream: Upstream, request: list[bytes], timeout_s: float
    ) -> Upstream:
        try:
            await upstream.start(request, timeout_s)
        except BaseException:
            upstream.close()
            raise
        return upstream

    def _take(self, origin: str) -> Upstream | None:
        """An idle connection to ``origin``, if there is one."""
        idle = self._idle.get(origin, [])
        while idle:
            upstream = idle.pop()
            if upstream.usable:
                return upstream
        return None

    def _put(self, upstream: Upstream, origin: str) -> None:
        self._idle[origin].append(upstream)

    def _discard(self, upstream: Upstream, origin: str) -> None:
        idle = self._idle.get(origin)
        if idle and upstream in idle:
            idle.remove(upstream)

    async def _connect(self, base_url: str) -> Upstream:
        parts = urlsplit(base_url)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, upstream = await asyncio.get_running_loop().create_connection(
                    lambda: Upstream(self, base_url), parts.hostname or "", parts.port or 80
                )
        except (OSError, TimeoutError) as exc:
            reason = str(exc) or f"no answer within {self._connect_timeout_s} s"
            raise Unreachable(f"{base_url} cannot be reached: {reason}.") from exc
        return upstream


def _request(base_url: str, path: str, body: bytes, headers: Headers) -> list[bytes]:
    """The bytes of a request, in the pieces to write."""
    parts = urlsplit(base_url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{base_url!r} is not an http://host:port address")
    lines = [
        b"POST %b%b HTTP/1.1" % (parts.path.rstrip("/").encode(), path.encode()),
        b"host: %b" % parts.netloc.encode(),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        *(b"%b: %b" % header for header in headers),
        b"\r\n",
    ]
    head = b"\r\n".join(lines)
    return [head + body] if len(body) < _JOIN_BELOW_BYTES else [head, body]
