"""Logging: one configuration for every process, one vocabulary of fields.

An entry is an event name and fields: ``log.info("finished", extra={"request_id": ...})``. Text on
a terminal, one JSON object a line with ``--log-json``. Never prompts, answers or secrets.
"""

from __future__ import annotations

import logging
import logging.config
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
    "waited_s",
    "ttft_s",
    "duration_s",
    "tokens",
    "cached_tokens",
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


class TextFormatter(logging.Formatter):
    """``2026-05-01 12:30:01 INFO controller finished outcome=stop ttft_s=0.12`` for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s  %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return " ".join([line, *(f"{name}={value}" for name, value in _fields(record).items())])


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
        return orjson.dumps(entry, default=str).decode()


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
