"""What the cluster does, looked at every two seconds for all viewers together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from protocol.errors import TandemError
from ui.client import ClusterView, Controller, ControllerAway

INTERVAL_S = 2.0
SAMPLES = 91
"""Three minutes, both ends included."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: rates over the interval before it, gauges at it."""

    tokens_per_s: float
    running: int
    waiting: int
    ttft_s: float | None  # median of the requests that began in the last minute
    ttft_p95_s: float | None


class Watch:
    """The newest view of the cluster, and the last three minutes as numbers."""

    def __init__(
        self, controller: Controller, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._controller = controller
        self._clock = clock
        self.view: ClusterView | None = None
        self.away: str | None = "it has not been asked yet"
        self.away_since: float | None = None
        self.refused: TandemError | None = None
        self.history: deque[Sample] = deque(maxlen=SAMPLES)
        self.counters: Mapping[str, float] = {}
        self._before: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=31)

    @property
    def there(self) -> bool:
        return self.away is None

    @property
    def away_for_s(self) -> float:
        return 0.0 if self.away_since is None else self._clock() - self.away_since

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> None:
        """Ask once; failures are remembered, not raised."""
        try:
            view = await self._controller.cluster()
            counters = await self._controller.samples()
        except ControllerAway as exc:
            self._lost(str(exc))
        except TandemError as error:
            self.refused = error
            self._lost(error.message)
        else:
            if not self.there:
                log.info("the controller answers", extra={"address": self._controller.address})
            self.view, self.away, self.away_since, self.refused = view, None, None, None
            self._note(view, counters)

    def _lost(self, reason: str) -> None:
        if self.there or self.away_since is None:
            self.away_since = self._clock()
            log.warning(
                "the controller is away",
                extra={"address": self._controller.address, "reason": reason},
            )
        self.away = reason

    def _note(self, view: ClusterView, counters: Mapping[str, float]) -> None:
        now = self._clock()
        tokens_per_s = 0.0
        if self._before:
            at, last = self._before[-1]
            grown = _grown(last, counters, "tandem_generated_tokens_total")
            tokens_per_s = grown / max(now - at, 0.001)
        first = self._before[0][1] if self._before else counters
        self._before.append((now, counters))
        self.counters = counters
        self.history.append(
            Sample(
                tokens_per_s=tokens_per_s,
                running=view.load.inflight,
                waiting=view.load.waiting,
                ttft_s=quantile(first, counters, 0.5),
                ttft_p95_s=quantile(first, counters, 0.95),
            )
        )


def _grown(before: Mapping[str, float], now: Mapping[str, float], name: str) -> float:
    """By how much a counter grew; a restarted controller begins at 0 again."""
    grown = now.get(name, 0.0) - before.get(name, 0.0)
    return now.get(name, 0.0) if grown < 0 else grown


def quantile(before: Mapping[str, float], now: Mapping[str, float], share: float) -> float | None:
    """The time to first token that ``share`` of the requests between two looks kept to.

    Straight lines within a bucket, as Prometheus draws them; ``None`` without a request.
    """
    bounds = sorted(
        (float(name.partition("<=")[2]), _grown(before, now, name))
        for name in now
        if name.startswith("ttft<=")
    )
    total = bounds[-1][1] if bounds else 0.0
    if total <= 0:
        return None
    rank, low, below = share * total, 0.0, 0.0
    for bound, count in bounds:
        if count >= rank:
            if bound == float("inf") or count == below:
                return low
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return low
