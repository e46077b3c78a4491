"""Logging: one configuration for every process, one vocabulary of fields.

An entry is an event name and fields: ``log.info("finished", extra={"request_id": ...})``. Text on
a terminal, one JSON object a line with ``--log-json``. Never prompts, answers or secrets.
"""

from __future__ import annotations

import logging
import logging.config
import re
from contextvars import ContextVar
from typing import Any

import orjson

FIELDS = (
    "request_id",
    "worker_id",
    "address",
    "model",
    "key",
    "kind",
    "outcome",
    "status",
    "path",
    "waited_s",
    "ttft_s",
    "duration_s",
    "prompt_tokens",
    "cached_tokens",
    "tokens",
    "tries",
    "queue_depth",
    "state",
    "reason",
)
"""The fields an entry may carry, in the order they are printed."""

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request being served, added to each entry made while serving it."""


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    values = {name: getattr(record, name, None) for name in FIELDS}
    if values["request_id"] is None:
        values["request_id"] = request_id_var.get()
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
        if value is not None
    }


_PLAIN = re.compile(r"[^\s'\"\\=]+")


def _shown(value: object) -> str:
    """A field's value in a line of text. What a client named with line breaks, escape sequences
    or ``outcome=stop`` in it is quoted, so that it forges neither a line nor a field."""
    text = str(value)
    return text if text.isprintable() and _PLAIN.fullmatch(text) else repr(text)


class TextFormatter(logging.Formatter):
    """``2026-05-01 12:30:01 INFO controller finished outcome=stop ttft_s=0.12`` for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s  %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        fields = _fields(record).items()
        return " ".join([line, *(f"{name}={_shown(value)}" for name, value in fields)])


_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        line = orjson.dumps(entry, default=str).decode()
        # JSON itself escapes only what is below a space; terminals obey more, and so do some who
        # split lines.
        return line if line.isprintable() else _UNPRINTABLE.sub(_escaped, line)


def configure(*, level: str = "INFO", as_json: bool = False) -> None:
    """Apply the one logging configuration; called by ``__main__`` only."""
    formatter = JsonFormatter if as_json else TextFormatter
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"ours": {"()": formatter}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "ours"}},
            "root": {"level": level, "handlers": ["stderr"]},
            "loggers": {
                # These log each request or heartbeat at INFO, which would be the whole log.
                "httpx": {"level": "WARNING"},
                "httpcore": {"level": "WARNING"},
                "uvicorn.access": {"level": "WARNING"},
                "uvicorn.error": {"level": "WARNING"},
            },
        }
    )
