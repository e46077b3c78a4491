"""The life of one request: admitted, placed, relayed, retried, accounted for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from controller.accounts import Accounts, Asker
from controller.dispatch import Demand, Dispatcher
from controller.liveness import Liveness
from controller.proxy import Relay
from controller.registry import Replica
from controller.settings import ControllerSettings
from protocol.errors import NoReplicaAvailable, TandemError
from protocol.events import Failed, encode_sse
from protocol.messages import GenerateRequest
from transport.asgi import LastChunk
from transport.client import HttpPool


class Generator:
    """Turns a request into a stream of frames, whatever happens to the workers."""

    def __init__(
        self,
        settings: ControllerSettings,
        dispatcher: Dispatcher,
        liveness: Liveness,
        pool: HttpPool,
        accounts: Accounts,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._dispatcher = dispatcher
        self._liveness = liveness
        self._pool = pool
        self._accounts = accounts
        self._clock = clock

    async def stream(
        self, request: GenerateRequest, body: bytes, request_id: str, asker: Asker
    ) -> AsyncGenerator[bytes]:
        """Whole SSE frames; the last one is the terminal event (law L1).

        Before the first frame a lost or draining replica is excluded and the request placed
        again, unseen by the client. ``body`` is ``request`` as JSON and goes to the worker as is.

        Raises:
            TandemError: before the first frame only; after it the error is a ``Failed`` frame.
        """
        demand = Demand.of(request, len(body))
        account = self._accounts.open(request, request_id, asker, demand)
        tried: frozenset[str] = frozenset()
        lost: TandemError | None = None
        # One generator, not one a layer: each would cost every token a hop.
        try:
            while True:
                attempt = account.begin_try(self._clock())
                async with self._dispatcher.lease(demand, tried) as replica:
                    attempt.placed(replica, self._clock())
                    relay = self._relay(replica)
                    try:
                        await relay.open(request, body, request_id, account.context_headers)
                        data = await relay.read()
                        if isinstance(relay.terminal, Failed):
                            raise relay.terminal.error()  # nothing was sent: still a refusal (L3)
                        observe = self._accounts.first(account, attempt).itl_s.observe
                        last_at = self._clock()
                        while relay.terminal is None:
                            yield data
                            account.chunks += 1
                            data = await relay.read()
                            now = self._clock()
                            observe(now - last_at)
                            last_at = now
                        attempt.ended(last_at)
                        account.terminal = relay.terminal
                        yield LastChunk(data)
                        return
                    except TandemError as error:
                        attempt.ended(self._clock(), error.code)
                        self._liveness.suspect(replica, error)
                        if account.ttft_s is not None or not error.retry_elsewhere:
                            raise
                        lost = error
                        tried |= {replica.address}
                    finally:
                        relay.close()
                self._accounts.retried()
        except TandemError as error:
            # What failed says more than that no replica is left.
            told = lost if lost is not None and isinstance(error, NoReplicaAvailable) else error
            account.outcome = told.code
            if account.ttft_s is None:
                raise told from None
            yield LastChunk(encode_sse(Failed.of(told)))
        finally:
            self._accounts.close(account)

    def _relay(self, replica: Replica) -> Relay:
        return Relay(
            self._pool,
            replica,
            first_event_timeout_s=self._settings.first_event_timeout_s,
            event_timeout_s=self._settings.event_timeout_s,
        )
