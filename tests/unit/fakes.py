"""Hand-made stand-ins for clocks and workers."""

from __future__ import annotations

from typing import Any

from protocol.messages import Capabilities, WorkerStatus


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def status(**fields: Any) -> WorkerStatus:
    """A worker of ours."""
    adapters = fields.get("adapters", ())
    defaults: dict[str, Any] = {
        "model_names": ("m", *(f"m:{adapter}" for adapter in adapters)),
        "worker_id": "w",
        "epoch": 1,
        "kind": "hf",
        "capacity": 2,
        "speed": 10.0,
        "capabilities": Capabilities(chat=True, images=True),
        "protocol_version": 1,
    }
    return WorkerStatus(**defaults | fields)
