"""The life of one request: admitted, placed, relayed, retried, accounted for."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from controller.callers import Caller
from controller.dispatch import Demand, Dispatcher
from controller.liveness import Liveness
from controller.metrics import Metrics
from controller.policy import prompt_work
from controller.proxy import Relay
from controller.registry import Replica
from controller.settings import ControllerSettings
from protocol.errors import NoReplicaAvailable, TandemError
from protocol.events import Failed, Finished, Terminal, encode_sse
from protocol.messages import GenerateRequest
from transport.asgi import LastChunk
from transport.client import HttpPool

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Account:
    """What is told of a request when it has ended."""

    begun_at: float
    outcome: str = "cancelled"
    worker_id: str | None = None
    waited_s: float = 0.0
    ttft_s: float | None = None
    terminal: Terminal | None = None
    chunks: int = 0  # that were relayed


class Generator:
    """Turns a request into a stream of frames, whatever happens to the workers."""

    def __init__(
        self,
        settings: ControllerSettings,
        dispatcher: Dispatcher,
        liveness: Liveness,
        pool: HttpPool,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._dispatcher = dispatcher
        self._liveness = liveness
        self._pool = pool
        self._metrics = metrics
        self._clock = clock

    async def stream(
        self, request: GenerateRequest, body: bytes, request_id: str, *, caller: Caller
    ) -> AsyncGenerator[bytes]:
        """Whole SSE frames; the last one is the terminal event (law L1).

        Before the first frame a lost or draining replica is excluded and the request placed
        again, unseen by the client. ``body`` is ``request`` as JSON and goes to the worker as is.

        Raises:
            TandemError: before the first frame only; after it the error is a ``Failed`` frame.
        """
        account = _Account(self._clock())
        demand = Demand.of(request, len(body))
        tried: frozenset[str] = frozenset()
        lost: TandemError | None = None
        # One generator, not one a layer: each would cost every token a hop.
        try:
            caller.check_model(request.model, request.adapter)
            while True:
                asked_at = self._clock()
                async with self._dispatcher.lease(demand, tried) as replica:
                    account.waited_s += self._clock() - asked_at
                    account.worker_id = replica.worker_id
                    relay = self._relay(replica)
                    try:
                        await relay.open(request, body, request_id)
                        data = await relay.read()
                        if isinstance(relay.terminal, Failed):
                            raise relay.terminal.error()  # nothing was sent: still a refusal (L3)
                        last_at = self._first(account)
                        while relay.terminal is None:
                            yield data
                            account.chunks += 1
                            data = await relay.read()
                            now = self._clock()
                            self._metrics.itl_s.observe(now - last_at)
                            last_at = now
                        account.terminal = relay.terminal
                        yield LastChunk(data)
                        return
                    except TandemError as error:
                        self._liveness.suspect(replica, error)
                        if account.ttft_s is not None or not error.retry_elsewhere:
                            raise
                        lost = error
                        tried |= {replica.address}
                    finally:
                        relay.close()
                self._metrics.retries.inc()
        except TandemError as error:
            # What failed says more than that no replica is left.
            told = lost if lost is not None and isinstance(error, NoReplicaAvailable) else error
            account.outcome = told.code
            if account.ttft_s is None:
                raise told from None
            yield LastChunk(encode_sse(Failed.of(told)))
        finally:
            self._close(account, request, request_id, caller)

    def _relay(self, replica: Replica) -> Relay:
        return Relay(
            self._pool,
            replica,
            first_event_timeout_s=self._settings.first_event_timeout_s,
            event_timeout_s=self._settings.event_timeout_s,
        )

    def _first(self, account: _Account) -> float:
        """The first event is here: the time to first token is known."""
        now = self._clock()
        account.ttft_s = now - account.begun_at
        self._metrics.ttft_s.observe(account.ttft_s)
        return now

    def _close(
        self, account: _Account, request: GenerateRequest, request_id: str, caller: Caller
    ) -> None:
        """Metrics and the one log line of this request."""
        duration_s = self._clock() - account.begun_at
        finished = account.terminal if isinstance(account.terminal, Finished) else None
        if finished is not None:
            account.outcome = finished.reason
            self._metrics.finished(finished)
        elif isinstance(account.terminal, Failed):
            account.outcome = account.terminal.code
        caller.charge(_used(account, request))
        self._metrics.requests.labels(account.outcome).inc()
        self._metrics.duration_s.observe(duration_s)
        self._metrics.waited_s.observe(account.waited_s)
        log.info(
            "finished",
            extra={
                "request_id": request_id,
                "model": request.model,
                "key": caller.name,
                "worker_id": account.worker_id,
                "outcome": account.outcome,
                "waited_s": account.waited_s,
                "ttft_s": account.ttft_s,
                "duration_s": duration_s,
                "tokens": finished.completion_tokens if finished else None,
                "cached_tokens": finished.cached_tokens if finished else None,
            },
        )


def _used(account: _Account, request: GenerateRequest) -> int:
    """The tokens of the prompt and the answer; of an answer without an end, those at least that
    came, and the prompt as placement counts it."""
    if isinstance(account.terminal, Finished):
        return account.terminal.prompt_tokens + account.terminal.completion_tokens
    return 0 if account.ttft_s is None else account.chunks + round(prompt_work(request))
