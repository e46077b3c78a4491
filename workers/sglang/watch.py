"""Whether the SGLang server lives and works, and what it says of its load."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from protocol.errors import DeadlineExceeded, EngineFailed, TandemError, UpstreamLost
from transport.process import first_of
from workers.engine import EngineLoad
from workers.sglang.client import SglangClient
from workers.sglang.figures import Load, tokens_per_s
from workers.sglang.process import ServerProcess

log = logging.getLogger(__name__)

LOOK_S = 0.5
LOST_AFTER = 2
"""Looks in a row at which a server we did not start must be gone, or any must answer oddly."""

SPEED_WEIGHT = 0.3  # of the newest sample


class Watch:
    """Looks after one server: ours (``process``), or a running one.

    Three things end its patience: the death of one of the server's processes, no step of a
    scheduler for ``hang_timeout_s`` while it has requests, and an idle server that twice in a row
    does not make a token when it is asked for one, every ``health_interval_s``.
    """

    def __init__(
        self,
        client: SglangClient,
        process: ServerProcess | None,
        *,
        hang_timeout_s: float,
        health_interval_s: float,
    ) -> None:
        self._client = client
        self._process = process
        self._hang_timeout_s = hang_timeout_s
        self._health_interval_s = health_interval_s
        self._failure: asyncio.Future[TandemError] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._poke = asyncio.Event()
        self._running = 0
        self._requests = 0  # ever begun
        now_s = time.monotonic()
        self._heard_s = self._token_s = self._answered_s = self._asked_s = now_s
        self._stepped_s: tuple[float, ...] = ()  # when each scheduler was seen to take a step
        self._doubted_s: float | None = None  # the newest token when one was asked for in vain
        self._load: Load | None = None
        self._others = (0, 0)
        self._tokens_per_s: float | None = None

    # ---- life

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def failed(self) -> None:
        """Wait for the server's end.

        Raises:
            EngineFailed, OutOfMemory: it has died, or hangs.
        """
        raise await asyncio.shield(self._failure)

    async def reason(self, lost: UpstreamLost) -> TandemError:
        """Why a connection is ``lost``: the server's own reason if it has died."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                return await asyncio.shield(self._failure)
        return EngineFailed(f"The SGLang server is lost: {lost.message}")

    def hung(self) -> EngineFailed:
        return EngineFailed(
            f"The SGLang server has done nothing for {self._hang_timeout_s:g} s.",
            remedy="If it only is slow, raise --hang-timeout-s.",
        )

    # ---- requests

    @contextmanager
    def request(self) -> Iterator[Callable[[], None]]:
        """One request runs within; it calls what it is given when it gets a token."""
        self._running += 1
        self._requests += 1
        try:
            yield self._token
        finally:
            self._running -= 1
            self._poke.set()  # the figures have changed

    def _token(self) -> None:
        self._heard_s = self._token_s = time.monotonic()

    # ---- figures

    @property
    def held_tokens(self) -> int | None:
        """In the cache, as the server said last (see ``Load``)."""
        return None if self._load is None else self._load.held_tokens

    def load(self) -> EngineLoad:
        running, waiting = self._others
        return EngineLoad(
            tokens_per_s=self._tokens_per_s,
            others_running=running,
            others_waiting=waiting,
            token_age_s=time.monotonic() - self._token_s,
        )

    async def look(self) -> None:
        """Ask for the server's figures now.

        Raises:
            DeadlineExceeded, UpstreamLost: it does not answer.
            EngineFailed: it does not answer as SGLang does.
        """
        load = await self._client.load()
        now_s = time.monotonic()
        self._answered_s = now_s
        before, self._load = self._load, load
        if before is None or len(before.steps) != len(load.steps):
            self._stepped_s = (now_s,) * len(load.steps)
        else:
            self._stepped_s = tuple(
                seen_s if new == old else now_s
                for seen_s, old, new in zip(self._stepped_s, before.steps, load.steps, strict=True)
            )
        if before is None:
            return
        if load.steps != before.steps:
            self._heard_s = now_s
        if load.decoded_tokens > before.decoded_tokens:
            self._token_s = now_s
        if (sample := tokens_per_s(before, load)) is not None:
            mean = self._tokens_per_s
            self._tokens_per_s = sample if mean is None else mean + SPEED_WEIGHT * (sample - mean)
        if self._process is None:
            # Seen twice: an answer of ours that has just ended may still be counted there.
            running = min(before.running, load.running)
            waiting = min(before.waiting, load.waiting)
            others = max(0, running + waiting - self._running)
            self._others = (min(running, others), max(0, others - running))

    async def until_flushed(self) -> None:
        """Return when the figures are those after a flush, which are published a little later."""
        with suppress(DeadlineExceeded, EngineFailed, UpstreamLost, TimeoutError):
            async with asyncio.timeout(1):
                await self.look()
                while self.held_tokens:
                    await asyncio.sleep(0.02)
                    await self.look()

    # ---- the watch

    async def _run(self) -> None:
        try:
            await first_of(self._until_dead(), self._until_silent())
        except TandemError as error:
            self._failure.set_result(error)
        except Exception as exc:
            log.exception("the watch of the SGLang server failed")
            self._failure.set_result(EngineFailed(f"The watch failed: {type(exc).__name__}."))
        # Who waits for a part of the server that lives on would wait for ever.
        self._client.cut()

    async def _until_dead(self) -> None:
        if self._process is None:
            await asyncio.Event().wait()
        else:
            await self._process.wait()
            raise self._process.failure()

    async def _until_silent(self) -> None:
        lost = 0
        health: asyncio.Task[None] | None = None
        try:
            while True:
                # Not wait_for: in Python 3.11 it loses a cancellation that comes with a poke.
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._poke.wait()
                self._poke.clear()
                try:
                    await self.look()
                    lost = 0
                except DeadlineExceeded:
                    pass  # a server this busy may well be working
                except UpstreamLost as exc:
                    lost += 1
                    if self._process is None and lost >= LOST_AFTER:
                        raise EngineFailed(
                            f"{self._client.base_url} does not answer any more: {exc.message}"
                        ) from exc
                except EngineFailed:
                    lost += 1  # one odd answer may be a proxy's
                    if lost >= LOST_AFTER:
                        raise
                if self._silent_s() > self._hang_timeout_s:
                    raise self.hung()
                if health is not None and health.done():
                    health.result()
                    health = None
                if health is None and self._is_due():
                    health = asyncio.create_task(self._prove())
        finally:
            if health is not None:
                health.cancel()
                await asyncio.wait([health])

    def _silent_s(self) -> float:
        """How long nothing has been heard that should have been.

        An answer that nobody reads makes no demands: its client is slow, not the server.
        """
        now_s = time.monotonic()
        if not self._running:
            return now_s - self._answered_s
        silent_s = now_s - self._heard_s
        # One of several hangs while others step, and no token of ours says whose it is.
        if self._load is not None and len(self._load.requests) > 1:
            for requests, stepped_s in zip(self._load.requests, self._stepped_s, strict=True):
                if requests:
                    silent_s = max(silent_s, self._answered_s - stepped_s)
        return min(silent_s, self._client.awaited_s)

    def _is_idle(self) -> bool:
        """Whether nothing is known that could keep the server from making a token."""
        busy = self._running or self._client.adapters_changing
        return self._load is not None and not busy and not any(self._load.requests)

    def _is_due(self) -> bool:
        since_s = time.monotonic() - max(self._token_s, self._asked_s)
        return self._is_idle() and since_s > self._health_interval_s

    async def _prove(self) -> None:
        """Have the idle server make one token.

        Once in vain is no proof: another client's long prompt, or its adapter, may hold up the
        schedulers, which say so only afterwards. That they take steps proves nothing either: they
        do so without anything to do, whatever has become of the process that sends the tokens.

        Raises:
            EngineFailed: it made none the second time either, and nothing has come in its way.
        """
        requests, token_s = self._requests, self._token_s
        made = await self._client.makes_a_token()
        self._asked_s = time.monotonic()
        if made:
            self._token_s = self._asked_s
        elif requests == self._requests and self._is_idle():
            if self._doubted_s == token_s == self._token_s:
                raise EngineFailed(
                    "The SGLang server answers, but when it was asked for one token it made none."
                )
            self._doubted_s = token_s
