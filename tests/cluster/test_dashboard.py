"""The dashboard and the document show what the processes really tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import Cluster, ask, good_stream

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
LEFT_OUT = {"tandem_build_info"}
"""Families of the controller that the dashboard leaves out: a version is looked up, not drawn."""
PROMETHEUS_ADDS = {"instance", "job"}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "grafana" / "tandem.json").read_text())
    return found


def targets(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield from panel.get("targets", ())


async def told(client: httpx.AsyncClient) -> list[Metric]:
    return list(text_string_to_metric_families((await client.get("/metrics")).text))


async def controllers(cluster: Cluster) -> tuple[list[Metric], list[Metric]]:
    """The families of a controller and of a worker that have answered a request."""
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    cache = {"used_tokens": 5, "size_tokens": 9, "hit_rate": 0.5}
    await cluster.faulty(controller, good_stream(), speed=0.0, cache=cache)
    client = cluster.client(controller)
    await ask(client, prompt="abc")
    await client.post("/v1/completions", content=b"{nonsense")
    return await told(client), await told(cluster.client(worker))


def labels_by_name(families: list[Metric]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_every_expression_of_the_dashboard_names_what_there_is(cluster: Cluster) -> None:
    families, _ = await controllers(cluster)
    there = labels_by_name(families)
    shown: set[str] = set()
    for target in targets(dashboard()):
        expression = target["expr"]
        selected = re.findall(r"([a-z_][a-z0-9_]*)\{([^{}]*)\}", expression)
        assert selected, f"{expression} selects nothing"
        labels = set(PROMETHEUS_ADDS)
        for name, matchers in selected:
            assert name in there, f"{name} of {expression} is not told"
            shown.add(name)
            labels |= there[name]
            asked = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", matchers))
            assert asked <= there[name] | PROMETHEUS_ADDS, expression
        for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
            assert set(re.split(r", *", grouped)) <= labels, expression
        assert set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))) <= labels
    for variable in dashboard()["templating"]["list"]:
        for name, label in re.findall(r"label_values\((\w+), (\w+)\)", str(variable["query"])):
            assert label in there[name] | PROMETHEUS_ADDS
    # And nothing in them is a metric without a selector, which the search would have missed.
    rest = " ".join(target["expr"] for target in targets(dashboard()))
    assert set(re.findall(r"\b(?:tandem|process)_\w+", rest)) == shown
    for family in families:
        if family.name.startswith("tandem_"):
            names = {sample.name for sample in family.samples}
            assert names & (shown | LEFT_OUT), f"{family.name} is neither shown nor left out"


def test_the_dashboard_asks_for_its_prometheus_and_has_no_two_of_one_id() -> None:
    board = dashboard()
    variables = {variable["name"]: variable["type"] for variable in board["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
    used = set(re.findall(r"\$(?:\{(\w+)\}|(\w+))", json.dumps(board["panels"])))
    assert {name for pair in used for name in pair if name} <= {*variables, "__rate_interval"}


async def test_the_document_lists_every_metric_and_no_other(cluster: Cluster) -> None:
    text = (DOCS / "observability.md").read_text()
    listed = set(re.findall(r"^\| `(tandem_\w+)`", text, re.M))
    families = [family for found in await controllers(cluster) for family in found]
    there = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if family.name.startswith("tandem_")
    }
    # An echo worker has no cache of which to tell.
    there |= {"tandem_worker_prefix_cache_hit_ratio"}
    there |= {"tandem_worker_cache_used_tokens", "tandem_worker_cache_size_tokens"}
    assert listed == there
