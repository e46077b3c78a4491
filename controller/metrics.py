"""Prometheus figures of the controller; the only place that owns numbers.

Names are those of vLLM and SGLang with our prefix. docs/observability.md lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.dispatch import Dispatcher
from controller.registry import Registry, Replica
from protocol.events import Finished
from protocol.messages import WorkerState, split_model
from transport.metrics import GAPS, SECONDS, Buckets, Exposition, Histograms

UNKNOWN_MODEL = "unknown"
"""The label of every model that no worker has ever served here: clients invent names."""


@dataclass(slots=True)
class ModelFigures:
    """Those of one model, looked up once a request."""

    requests: dict[str, Counter]  # by outcome
    ttft_s: Buckets
    itl_s: Buckets
    e2e_s: Buckets
    queue_s: Buckets
    prompt_tokens: Counter
    cached_tokens: Counter
    tokens: Counter


class Metrics:
    """Counters, histograms and gauges named ``tandem_*``."""

    def __init__(
        self, registry: Registry, dispatcher: Dispatcher, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._exposition = Exposition()
        self.text = self._exposition.text
        own = self._exposition.own
        self._requests = _counter(own, "requests", "Requests by how they ended", "model", "outcome")
        self._retries = _counter(own, "retries", "Requests placed again before their first event")
        self._prompt_tokens = _counter(own, "prompt_tokens", "Tokens of prompts", "model")
        self._cached_tokens = _counter(
            own, "cached_prompt_tokens", "Prompt tokens taken from a prefix cache", "model"
        )
        self._tokens = _counter(own, "generation_tokens", "Tokens generated", "model")
        self._ttft_s = _seconds(own, "time_to_first_token", "Request to first event")
        self._itl_s = _seconds(own, "inter_token_latency", "Between relayed events", GAPS)
        self._e2e_s = _seconds(own, "e2e_request_latency", "Request to last event")
        self._queue_s = _seconds(own, "request_queue_time", "Wait for a slot of a replica")
        self._models: dict[str, ModelFigures] = {}
        self._prompt_total = self._cached_total = 0
        _gauge(own, "prefix_cache_hit_ratio", "Share of prompt tokens cached", self._hit_ratio)
        load = dispatcher.statistics
        _gauge(own, "num_requests_waiting", "Requests waiting", lambda: load().waiting)
        _gauge(own, "num_requests_running", "Requests at workers", lambda: load().inflight)
        _gauge(own, "waiting_bytes", "Bytes of waiting bodies", lambda: load().waiting_bytes)
        _gauge(own, "ready_replicas", "Ready replicas", lambda: sum(r.ready for r in registry))
        own.register(_Replicas(registry, clock))

    def label(self, model: str) -> str:
        """``model`` as a label's value: itself, its base where it names an adapter, or unknown."""
        if self._registry.knows(model):
            return model
        base, adapter = split_model(model)
        return base if adapter is not None and self._registry.knows(base) else UNKNOWN_MODEL

    def of(self, model: str) -> ModelFigures:
        """The figures of ``model``, or of all that nobody serves."""
        label = self.label(model)
        if label not in self._models:
            self._models[label] = ModelFigures(
                requests={},
                ttft_s=self._ttft_s.of(label),
                itl_s=self._itl_s.of(label),
                e2e_s=self._e2e_s.of(label),
                queue_s=self._queue_s.of(label),
                prompt_tokens=self._prompt_tokens.labels(label),
                cached_tokens=self._cached_tokens.labels(label),
                tokens=self._tokens.labels(label),
            )
        return self._models[label]

    def retried(self) -> None:
        self._retries.inc()

    def refused(self, code: str) -> None:
        """A request that was turned away before anybody could tell for which model it is."""
        self._requests.labels(UNKNOWN_MODEL, code).inc()

    def ended(self, model: str, outcome: str, finished: Finished | None) -> None:
        """A request for ``model`` has ended, however."""
        figures = self.of(model)
        if outcome not in figures.requests:
            figures.requests[outcome] = self._requests.labels(self.label(model), outcome)
        figures.requests[outcome].inc()
        if finished is not None:
            figures.prompt_tokens.inc(finished.prompt_tokens)
            figures.cached_tokens.inc(finished.cached_tokens)
            figures.tokens.inc(finished.completion_tokens)
            self._prompt_total += finished.prompt_tokens
            self._cached_total += finished.cached_tokens

    def _hit_ratio(self) -> float:
        return self._cached_total / self._prompt_total if self._prompt_total else 0.0


class _Replicas(Collector):
    """What the registry knows of each worker, read when it is asked for.

    They are not called ``tandem_worker_*``: the workers' own figures are, and a sum over both
    would count everything twice.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        now = self._clock()
        replicas = _labelled(self._registry)
        for name, help_text, read in _REPLICA_GAUGES:
            family = GaugeMetricFamily(f"tandem_replica_{name}", help_text, labels=_REPLICA_LABELS)
            for labels, replica in replicas.items():
                if (value := read(replica)) is not None:
                    family.add_metric(labels, value)
            yield family
        age = GaugeMetricFamily(
            "tandem_replica_heartbeat_age_seconds", "Since its last news", labels=_REPLICA_LABELS
        )
        state = GaugeMetricFamily(
            "tandem_replica_state", "1 for the state it is in", labels=(*_REPLICA_LABELS, "state")
        )
        for labels, replica in replicas.items():
            age.add_metric(labels, now - replica.renewed_at)
            for one in WorkerState:
                state.add_metric((*labels, one.value), float(replica.status.state is one))
        yield from (age, state)


_REPLICA_LABELS = ("worker_id", "kind", "model")

_REPLICA_GAUGES: tuple[tuple[str, str, Callable[[Replica], float | None]], ...] = (
    ("num_requests_running", "Requests it decodes", lambda r: r.status.running),
    ("num_requests_waiting", "Requests that wait in it", lambda r: r.status.waiting),
    ("inflight", "Requests dispatched to it from here", lambda r: r.inflight),
    ("capacity", "Requests it decodes at once", lambda r: r.status.capacity),
    ("speed_tokens_per_second", "Decode speed it measured", lambda r: r.status.speed),
    (
        "prefix_cache_hit_ratio",
        "Share of prompt tokens it had cached",
        lambda r: r.status.cache.hit_rate if r.status.cache else None,
    ),
    (
        "cache_used_tokens",
        "Tokens in its prefix cache",
        lambda r: r.status.cache.used_tokens if r.status.cache else None,
    ),
    (
        "cache_size_tokens",
        "Tokens its prefix cache can hold",
        lambda r: r.status.cache.size_tokens if r.status.cache else None,
    ),
)


def _labelled(registry: Registry) -> dict[tuple[str, str, str], Replica]:
    """The replicas by their labels. Two that call themselves the same are told apart by address:
    Prometheus drops a scrape in which one series comes twice."""
    found: dict[tuple[str, str, str], Replica] = {}
    for replica in registry:
        status = replica.status
        model = (status.bases or status.model_names)[0]
        labels = (replica.worker_id, status.kind, model)
        if labels in found:
            labels = (f"{replica.worker_id} at {replica.address}", status.kind, model)
        found[labels] = replica
    return found


def _counter(own: CollectorRegistry, name: str, help_text: str, *labels: str) -> Counter:
    return Counter(f"tandem_{name}", help_text, labels, registry=own)


def _seconds(
    own: CollectorRegistry, name: str, help_text: str, bounds: tuple[float, ...] = SECONDS
) -> Histograms:
    return Histograms(f"tandem_{name}_seconds", help_text, bounds, ("model",), own)


def _gauge(own: CollectorRegistry, name: str, help_text: str, read: Callable[[], float]) -> None:
    Gauge(f"tandem_{name}", help_text, registry=own).set_function(read)
