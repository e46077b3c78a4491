"""Log entries: an event, its fields, and never a conversation."""

from __future__ import annotations

import json
import logging

from protocol.logs import JsonFormatter, TextFormatter, request_id_var


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("controller", logging.INFO, "x.py", 1, "finished", (), None)
    made.__dict__.update(fields)
    return made


def test_text() -> None:
    line = TextFormatter().format(record(outcome="stop", ttft_s=0.123456, prompt="secret"))
    assert line.endswith("INFO    controller  finished outcome=stop ttft_s=0.1235")


def test_json() -> None:
    entry = json.loads(JsonFormatter().format(record(tokens=3, prompt="secret")))
    assert entry["event"] == "finished"
    assert entry["tokens"] == 3
    assert "prompt" not in entry


def test_the_request_being_served_is_added() -> None:
    token = request_id_var.set("abc")
    try:
        assert "request_id=abc" in TextFormatter().format(record())
        assert "request_id=own" in TextFormatter().format(record(request_id="own"))
    finally:
        request_id_var.reset(token)


def test_a_traceback_follows_its_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError as exc:
        made = record(exc_info=(type(exc), exc, exc.__traceback__))
    assert "ValueError: broken" in TextFormatter().format(made)
    assert "ValueError: broken" in json.loads(JsonFormatter().format(made))["traceback"]
