"""What anybody can reach: every route, asked for without a credential.

A new route fails here until it is in the table, and so until somebody has decided whom it is for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
from starlette.routing import BaseRoute, Mount, Route

from controller import keys
from controller.__main__ import wire
from controller.app import create_app
from controller.gate import classify
from controller.intake import Intake
from controller.keys import KeyFile
from controller.settings import ControllerSettings
from tests.cluster.conftest import Cluster, Running
from transport.asgi import Beside
from workers import server
from workers.echo.engine import EchoEngine
from workers.echo.settings import EchoSettings
from workers.shell import Shell

TOKEN = "the-token-of-this-cluster"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")

CONTROLLER = {
    "GET /healthz": "open",
    "GET /cluster": "operator",
    "GET /metrics": "operator",
    "POST /workers/{worker_id}/drain": "operator",
    "POST /workers/{worker_id}/resume": "operator",
    "POST /register_worker": "worker",
    "POST /receive_heart_beat": "worker",
    "POST /worker_get_status": "worker",
    "GET /openapi.json": "client",
    "HEAD /openapi.json": "client",
    "GET /requests/{request_id}": "client",
    "GET /v1/models": "client",
    "GET /v1/models/{name:path}": "client",
    "POST /v1/chat/completions": "client",
    "POST /v1/completions": "client",
    "POST /worker_generate_stream": "client",
    "POST /list_models": "client",
    "POST /get_worker_address": "client",
    "POST /refresh_all_workers": "client",
    "GET /test_connection": "client",
    "POST /count_token": "client",
    "POST /list_language_models": "client",
    "POST /list_multimodal_models": "client",
    "POST /model_details": "client",
    "POST /worker_generate": "client",
    "POST /worker_get_conv_template": "client",
}
WORKER_OPEN = {"GET /healthz"}


def routes(app: Beside) -> set[str]:
    """Every method and path that ``app`` serves, those beside FastAPI included."""

    def found(some: list[BaseRoute]) -> Iterator[str]:
        for route in some:
            assert not isinstance(route, Mount), "look into it here, too"
            assert isinstance(route, Route), route
            for method in route.methods or ():
                yield f"{method} {route.path}"

    return {*found(app.app.routes), *(f"POST {path}" for path in app.streams)}


async def controller_app(settings: ControllerSettings) -> Beside:
    intake = Intake(settings.max_images, settings.max_tokens, settings.aliases)
    controller, pool = wire(settings, "controller", intake)
    try:
        return create_app(controller)
    finally:
        pool.close()
        await controller.liveness.aclose()


def worker_app() -> Beside:
    settings = EchoSettings(no_register=True)
    return server.create_app(Shell(EchoEngine(settings), "echo", "one", settings, lambda: None))


def concrete(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x", path)


async def reached(running: Running, served: set[str]) -> set[str]:
    """What of ``served`` answers, by any method, without having wanted to know who asks."""
    open_: set[str] = set()
    async with httpx.AsyncClient(base_url=running.address, trust_env=False) as client:
        for path in sorted({route.partition(" ")[2] for route in served}):
            for method in METHODS:
                response = await client.request(method, concrete(path))
                if response.status_code not in (401, 403):
                    open_.add(f"{method} {path}")
                else:
                    assert response.headers["x-request-id"]
    return open_


async def test_every_route_of_the_controller_has_its_class() -> None:
    served = routes(await controller_app(ControllerSettings()))
    assert {route: classify(*concrete(route).split(" ")).value for route in sorted(served)} == dict(
        sorted(CONTROLLER.items())
    )


async def test_with_keys_and_a_token_anybody_reaches_the_health_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    await asyncio.to_thread(keys.save, file, KeyFile())
    controller = await cluster.controller(cluster_token=TOKEN, api_key_file=file)
    found = await reached(controller, set(CONTROLLER))
    assert found == {"GET /healthz"}


async def test_with_a_token_anybody_reaches_what_clients_do(cluster: Cluster) -> None:
    controller = await cluster.controller(cluster_token=TOKEN)
    whom = {route.partition(" ")[2]: kind for route, kind in CONTROLLER.items()}
    found = {whom[route.partition(" ")[2]] for route in await reached(controller, set(CONTROLLER))}
    assert found == {"open", "client"}


async def test_of_a_worker_with_a_token_anybody_reaches_the_health_alone(
    cluster: Cluster,
) -> None:
    worker = await cluster.worker(cluster_token=TOKEN)
    served = routes(worker_app())
    assert "POST /worker_generate_stream" in served
    assert await reached(worker, served) == WORKER_OPEN
