"""Many workers as one: what a controller says of itself when another one asks."""

from __future__ import annotations

from collections.abc import Iterable

from controller.registry import Registry
from protocol.messages import PROTOCOL_VERSION, Capabilities, WorkerState, WorkerStatus


def aggregate(registry: Registry, *, worker_id: str, epoch: int) -> WorkerStatus | None:
    """The sum of the ready workers; ``None`` when there is none.

    The kind is theirs when they all have the same, else ``controller``.
    """
    statuses = [replica.status for replica in registry if replica.ready]
    if not statuses:
        return None
    kinds = {status.kind for status in statuses}
    capacities = [status.capacity for status in statuses]
    running = sum(status.running for status in statuses)
    waiting = sum(status.waiting for status in statuses)
    return WorkerStatus(
        model_names=tuple(_unique(name for s in statuses for name in s.model_names)),
        speed=sum(status.speed for status in statuses),
        queue_length=sum(status.queue_length for status in statuses),
        worker_id=worker_id,
        epoch=epoch,
        kind=kinds.pop() if len(kinds) == 1 else "controller",
        state=WorkerState.READY,
        capacity=None if None in capacities else sum(c for c in capacities if c is not None),
        running=running,
        waiting=waiting,
        context_length=min((s.context_length for s in statuses if s.context_length), default=None),
        capabilities=Capabilities(
            **{
                name: any(getattr(status.capabilities, name) for status in statuses)
                for name in Capabilities.model_fields
            }
        ),
        adapters=tuple(_unique(name for s in statuses for name in s.adapters)),
        protocol_version=PROTOCOL_VERSION,
    )


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
