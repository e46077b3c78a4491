"""What the processes of a cluster say about themselves, over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from protocol.messages import WorkerStatus
from transport import credentials

TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Health:
    ready: bool
    progress: str = ""


def client() -> httpx.AsyncClient:
    """A client for this machine's processes: short waits, no proxy in between, and the token that
    they have inherited from us."""
    return httpx.AsyncClient(
        timeout=TIMEOUT_S, trust_env=False, headers=credentials.from_environment()
    )


async def health(http: httpx.AsyncClient, address: str) -> Health | None:
    """``GET /healthz``; ``None`` when nobody answers."""
    try:
        response = await http.get(f"{address}/healthz")
    except httpx.TransportError:
        return None
    body = _json(response)
    progress = body.get("progress") or body.get("state") or ""
    return Health(ready=response.status_code == 200, progress=str(progress))


async def worker_status(http: httpx.AsyncClient, address: str) -> WorkerStatus | None:
    """``POST /worker_get_status``; ``None`` without a usable answer."""
    try:
        response = await http.post(f"{address}/worker_get_status")
        return WorkerStatus.model_validate(_json(response))
    except (httpx.TransportError, ValidationError):
        return None


async def routable(http: httpx.AsyncClient, controller_address: str) -> frozenset[str]:
    """The addresses of the workers the controller sends requests to."""
    try:
        response = await http.get(f"{controller_address}/cluster")
    except httpx.TransportError:
        return frozenset()
    workers = _json(response).get("workers")
    return frozenset(
        str(worker.get("address"))
        for worker in (workers if isinstance(workers, list) else [])
        if isinstance(worker, dict) and worker.get("state") == "ready"
    )


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
