"""Prometheus figures of the controller; the only place that owns numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.dispatch import Dispatcher
from controller.registry import Registry
from protocol.events import Finished

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """Counters, histograms and gauges named ``tandem_*``."""

    def __init__(self, registry: Registry, dispatcher: Dispatcher) -> None:
        own = CollectorRegistry()
        self._own = own
        self.requests = Counter(
            "tandem_requests", "Requests by how they ended", ["outcome"], registry=own
        )
        self.retries = Counter(
            "tandem_retries", "Requests placed again before their first event", registry=own
        )
        self.ttft_s = Histogram(
            "tandem_ttft_seconds", "Request to first event", buckets=_SECONDS, registry=own
        )
        self.itl_s = _Gaps("tandem_itl_seconds", "Gap between relayed events")
        own.register(self.itl_s)
        self.duration_s = Histogram(
            "tandem_request_seconds", "Request to last event", buckets=_SECONDS, registry=own
        )
        self.waited_s = Histogram(
            "tandem_admission_wait_seconds", "Wait for a slot", buckets=_SECONDS, registry=own
        )
        self._prompt_tokens = Counter("tandem_prompt_tokens", "Prompt tokens", registry=own)
        self._cached_tokens = Counter(
            "tandem_cached_prompt_tokens", "Prompt tokens taken from a prefix cache", registry=own
        )
        self._tokens = Counter("tandem_generated_tokens", "Tokens generated", registry=own)
        _gauge(own, "queue_depth", "Requests that wait", lambda: dispatcher.statistics().waiting)
        _gauge(own, "inflight", "Requests dispatched", lambda: dispatcher.statistics().inflight)
        _gauge(own, "ready_replicas", "Ready replicas", lambda: sum(r.ready for r in registry))

    def finished(self, event: Finished) -> None:
        self._prompt_tokens.inc(event.prompt_tokens)
        self._cached_tokens.inc(event.cached_tokens)
        self._tokens.inc(event.completion_tokens)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._own)


class _Gaps(Collector):
    """A histogram that is written once a token, at a fifth of what prometheus_client's costs."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name = name
        self._help_text = help_text
        self._counts = [0] * (len(_GAPS) + 1)
        self._sum = 0.0

    def observe(self, gap_s: float) -> None:
        self._counts[bisect_left(_GAPS, gap_s)] += 1
        self._sum += gap_s

    def collect(self) -> list[Metric]:
        bounds = [*map(str, _GAPS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return [HistogramMetricFamily(self._name, self._help_text, buckets, self._sum)]


def _gauge(own: CollectorRegistry, name: str, help_text: str, read: Callable[[], float]) -> None:
    Gauge(f"tandem_{name}", help_text, registry=own).set_function(read)
