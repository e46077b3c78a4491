"""Figures: our histogram is Prometheus's, and every process tells of itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from pydantic import ValidationError

from controller.metrics import Metrics
from controller.registry import Registry
from protocol.messages import WorkerStatus
from protocol.version import VERSION
from transport.metrics import GAPS, Exposition, Histograms
from transport.settings import ProcessSettings
from transport.tracing import traces_url


@given(st.lists(st.floats(min_value=0, max_value=10) | st.sampled_from(GAPS)))
def test_our_histogram_is_written_as_theirs(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histograms("gap_seconds", "Gaps", GAPS, ("model",), ours).of("echo")
    their = Histogram("gap_seconds", "Gaps", ["model"], buckets=GAPS, registry=theirs)
    for value in values:
        mine.observe(value)
        their.labels("echo").observe(value)
    their.labels("echo")
    expected = [x for x in generate_latest(theirs).splitlines() if b"_created" not in x]
    assert generate_latest(ours).splitlines() == expected


async def test_every_process_tells_its_version_and_its_memory() -> None:
    text = (await Exposition().text()).decode()
    assert f'tandem_build_info{{version="{VERSION}"}} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert "process_cpu_seconds_total" in text


def test_the_version_is_that_of_pyproject() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://otel.lab/v1/traces", "https://otel.lab/v1/traces"),
        ("http://tempo:4318/otlp", "http://tempo:4318/otlp/v1/traces"),
    ],
)
def test_where_traces_go(endpoint: str, url: str) -> None:
    assert traces_url(str(ProcessSettings(otlp_endpoint=endpoint).otlp_endpoint)) == url


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:4318", "grpc://a:4317", "http://", "http://a:x", "http://me:pw@a:4318"]
)
def test_a_wrong_collector_is_refused_without_its_password(endpoint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ProcessSettings(otlp_endpoint=endpoint)
    assert "me:pw" not in caught.value.errors(include_input=False)[0]["msg"]


class Load:
    """The dispatcher, as far as figures look at it."""

    waiting = waiting_bytes = inflight = 0

    def statistics(self) -> Load:
        return self


def made(*names: str, adapters: tuple[str, ...] = ()) -> tuple[Metrics, Registry]:
    registry = Registry(
        clock=lambda: 5.0, ttl_s=9, on_change=lambda: None, on_event=lambda event: None
    )
    status = WorkerStatus(model_names=names, adapters=adapters, worker_id='w"1\n')
    registry.register("http://a:1", status)
    return Metrics(registry, Load(), lambda: 7.0), registry  # type: ignore[arg-type]


def test_a_models_label_is_bounded_by_what_workers_serve() -> None:
    metrics, registry = made("llava", "llava:formal", "odd:name", adapters=("formal",))
    assert metrics.label("llava") == "llava"
    assert metrics.label("llava:formal") == "llava"
    assert metrics.label("llava:invented") == "llava"
    assert metrics.label("odd:name") == "odd:name"
    assert metrics.label("odd:invented") == "unknown"
    assert metrics.label("invented") == "unknown"
    registry.remove(next(iter(registry)), "lost", "gone")
    assert metrics.label("llava") == "llava"  # known is known


async def test_what_workers_call_themselves_is_escaped_and_goes_with_them() -> None:
    metrics, registry = made("llava")
    text = (await metrics.text()).decode()
    series = 'tandem_replica_heartbeat_age_seconds{kind="llava",model="llava",worker_id="w\\"1\\n"}'
    assert f"{series} 2.0" in text.splitlines()
    assert "tandem_replica_capacity{" not in text  # LLaVA's workers do not say
    registry.remove(next(iter(registry)), "lost", "gone")
    assert "tandem_replica_inflight{" not in (await metrics.text()).decode()
