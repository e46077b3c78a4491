"""Prometheus: a histogram that every token can afford, and what every process tells of itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from anyio import to_thread
from prometheus_client import (
    CollectorRegistry,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.version import VERSION

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Bounds for what a request waits for."""

GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Bounds for the time between two tokens."""


class Buckets:
    """One histogram; ``observe`` costs a fifth of what prometheus_client's does."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric(labels, buckets, self._sum)


class Histograms(Collector):
    """The histograms of one name, by the values of its labels."""

    def __init__(
        self,
        name: str,
        help_text: str,
        bounds: Sequence[float],
        labels: Sequence[str],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._help_text = help_text
        self._bounds = bounds
        self._labels = labels
        self._children: dict[tuple[str, ...], Buckets] = {}
        registry.register(self)

    def of(self, *values: str) -> Buckets:
        """The one whose labels have ``values``; it appears with the first call."""
        if values not in self._children:
            self._children[values] = Buckets(self._bounds)
        return self._children[values]

    def collect(self) -> list[Metric]:
        family = HistogramMetricFamily(self._name, self._help_text, labels=self._labels)
        for values, buckets in self._children.items():
            buckets.add_to(family, values)
        return [family]


class Exposition:
    """All that ``/metrics`` tells: the figures in ``own`` and those of the process."""

    def __init__(self) -> None:
        # Else each counter brings a second series, which nobody draws.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.own = CollectorRegistry()
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        build = Info("tandem_build", "The version that runs here", registry=self._process)
        build.info({"version": VERSION})

    async def text(self) -> bytes:
        """Prometheus's text format. Our figures are read on the loop, which writes them, those of
        the process in a thread, as they come from files."""
        return generate_latest(self.own) + await to_thread.run_sync(generate_latest, self._process)
