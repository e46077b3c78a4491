"""Prometheus figures of one worker."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from protocol.messages import WorkerStatus


class Metrics:
    """Counters by what has ended, gauges by what the status says now."""

    def __init__(self, status: Callable[[], WorkerStatus]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tandem_worker_requests",
            "Requests by how they ended",
            ["outcome"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "tandem_worker_generated_tokens", "Tokens generated", registry=self._registry
        )
        for name, read in (
            ("running", lambda: status().running),
            ("waiting", lambda: status().waiting),
            ("speed_tokens_per_s", lambda: status().speed),
        ):
            gauge = Gauge(f"tandem_worker_{name}", f"{name} now", registry=self._registry)
            gauge.set_function(read)

    def ended(self, outcome: str, tokens: int) -> None:
        self._requests.labels(outcome).inc()
        self._tokens.inc(tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)
