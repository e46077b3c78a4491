"""Log entries: an event, its fields, and never a conversation."""

from __future__ import annotations

import json
import logging

import pytest

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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("pocket-llava:formal", "pocket-llava:formal"),
        ("模型", "模型"),
        ("two words", "'two words'"),
        ("echo outcome=stop", "'echo outcome=stop'"),
        ("a\nb", r"'a\nb'"),
        ("a\x1b[2J", r"'a\x1b[2J'"),
        ("a\u2028\u202e", r"'a\u2028\u202e'"),
        ("'a'", "\"'a'\""),
        ("", "''"),
    ],
)
def test_a_value_cannot_forge_a_field_or_a_line(value: str, shown: str) -> None:
    assert TextFormatter().format(record(model=value)).endswith(f"finished model={shown}")
    line = JsonFormatter().format(record(model=value))
    assert line.isprintable()
    assert json.loads(line)["model"] == value
