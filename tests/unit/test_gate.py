"""Whom each route is for."""

from __future__ import annotations

import pytest

from controller.gate import RouteClass, classify, counts


@pytest.mark.parametrize(
    ("method", "path", "whom"),
    [
        ("GET", "/healthz", "open"),
        ("POST", "/healthz", "client"),
        ("POST", "/v1/chat/completions", "client"),
        ("GET", "/v1/models", "client"),
        ("POST", "/worker_generate_stream", "client"),
        ("POST", "/refresh_all_workers", "client"),
        ("GET", "/openapi.json", "client"),
        ("POST", "/register_worker", "worker"),
        ("POST", "/worker_get_status", "worker"),
        ("GET", "/cluster", "operator"),
        ("GET", "/metrics", "operator"),
        ("POST", "/workers/a/drain", "operator"),
        ("GET", "/", "unknown"),
        ("GET", "/cluster/", "unknown"),
        ("GET", "/Cluster", "unknown"),
        ("GET", "//cluster", "unknown"),
        ("GET", "/v1", "unknown"),
        ("GET", "/docs", "unknown"),
    ],
)
def test_classes(method: str, path: str, whom: str) -> None:
    assert classify(method, path) is RouteClass(whom)


def test_looking_up_is_no_request() -> None:
    assert counts("POST", "/v1/chat/completions")
    assert counts("POST", "/worker_generate_stream")
    assert not counts("POST", "/list_models")
    assert not counts("GET", "/v1/models")
