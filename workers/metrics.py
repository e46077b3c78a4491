"""What one worker tells of itself and of each of its requests: figures, a log line, spans."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.events import Finished
from protocol.logs import request_id_var
from protocol.messages import GenerateRequest, WorkerStatus
from transport.metrics import SECONDS, Exposition, Histograms
from transport.tracing import Attributes, Trace

log = logging.getLogger(__name__)


class Metrics:
    """Counters by what has ended, gauges by what the status says now."""

    def __init__(self, status: Callable[[], WorkerStatus]) -> None:
        self._exposition = Exposition()
        self.text = self._exposition.text
        own = self._exposition.own
        self._requests = Counter(
            "tandem_worker_requests", "Requests by how they ended", ["outcome"], registry=own
        )
        self._prompt_tokens = Counter(
            "tandem_worker_prompt_tokens", "Tokens of prompts", registry=own
        )
        self._cached_tokens = Counter(
            "tandem_worker_cached_prompt_tokens",
            "Prompt tokens taken from the prefix cache",
            registry=own,
        )
        self._tokens = Counter("tandem_worker_generation_tokens", "Tokens generated", registry=own)
        name = "tandem_worker_time_to_first_token_seconds"
        self._ttft_s = Histograms(name, "Request to first event", SECONDS, (), own).of()
        name = "tandem_worker_request_queue_time_seconds"
        self._queue_s = Histograms(name, "Wait for a slot", SECONDS, (), own).of()
        own.register(_Status(status))

    def refused(self, code: str) -> None:
        """A request that was turned away before it was understood."""
        self._requests.labels(code).inc()

    def ended(self, account: Account) -> None:
        self._requests.labels(account.outcome).inc()
        self._tokens.inc(account.tokens)
        if account.finished is not None:
            self._prompt_tokens.inc(account.finished.prompt_tokens)
            self._cached_tokens.inc(account.finished.cached_tokens)
        if account.ttft_s is not None:
            self._ttft_s.observe(account.ttft_s)
        self._queue_s.observe(account.waited_s)


class _Status(Collector):
    """The status, asked for once a scrape."""

    def __init__(self, status: Callable[[], WorkerStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        cache = status.cache
        for name, help_text, value in (
            ("num_requests_running", "Requests decoded now", status.running),
            ("num_requests_waiting", "Requests that wait for a slot", status.waiting),
            ("capacity", "Requests decoded at once", status.capacity),
            ("speed_tokens_per_second", "Decode speed, measured", status.speed),
            (
                "prefix_cache_hit_ratio",
                "Share of prompt tokens cached",
                cache.hit_rate if cache else None,
            ),
            (
                "cache_used_tokens",
                "Tokens in the prefix cache",
                cache.used_tokens if cache else None,
            ),
            ("cache_size_tokens", "Tokens that fit there", cache.size_tokens if cache else None),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"tandem_worker_{name}", help_text, value=value)


@dataclass(slots=True)
class Account:
    """One request at this worker. Times are monotonic, ``None`` for what was not reached."""

    begun_at: float = field(default_factory=time.monotonic)
    trace: Trace | None = None
    queued_at: float | None = None  # it is allowed to wait for a slot
    slot_at: float | None = None  # it has one; its pictures are decoded
    ready_at: float | None = None  # the engine has it
    first_at: float | None = None  # its first event is here
    ended_at: float = 0.0
    tokens: int = 0
    outcome: str = "cancelled"
    error: str | None = None
    finished: Finished | None = None

    @property
    def waited_s(self) -> float:
        """For a slot, as far as it came."""
        if self.queued_at is None:
            return 0.0
        return (self.slot_at or self.ended_at) - self.queued_at

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.begun_at

    def fail(self, code: str) -> None:
        self.outcome = self.error = code

    def close(self, metrics: Metrics, request: GenerateRequest, worker_id: str) -> None:
        """Figures, the log line and the spans of a request that has ended, however."""
        self.ended_at = time.monotonic()
        finished = self.finished
        if finished is not None:
            self.outcome = finished.reason
        metrics.ended(self)
        log.info(
            "finished",
            extra={
                "worker_id": worker_id,
                "outcome": self.outcome,
                "waited_s": self.waited_s,
                "ttft_s": self.ttft_s,
                "duration_s": self.ended_at - self.begun_at,
                "prompt_tokens": finished.prompt_tokens if finished else None,
                "cached_tokens": finished.cached_tokens if finished else None,
                "tokens": self.tokens,
            },
        )
        if self.trace is not None:
            self._tell(self.trace, request, worker_id)

    def _tell(self, trace: Trace, request: GenerateRequest, worker_id: str) -> None:
        finished = self.finished
        begun = {
            "queue": self.queued_at,
            "images": self.slot_at if request.images else None,
            "prefill": self.ready_at,
            "decode": self.first_at,
        }
        if self.queued_at is not None:
            trace.phases(begun, self.ended_at, {}, self.error)
        operation = "chat" if request.messages is not None else "text_completion"
        attributes: Attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "tandem",
            "gen_ai.request.model": request.model,
            "gen_ai.response.finish_reasons": (finished.reason,) if finished else None,
            "gen_ai.usage.input_tokens": finished.prompt_tokens if finished else None,
            "gen_ai.usage.output_tokens": self.tokens,
            "tandem.cached_tokens": finished.cached_tokens if finished else None,
            "tandem.images": len(request.images),
            "tandem.request_id": request_id_var.get(),
            "tandem.outcome": self.outcome,
            "tandem.worker_id": worker_id,
        }
        trace.end(operation, self.ended_at, attributes, self.error)
