"""The controller's routes, and nothing else."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from controller import openai
from controller.accounts import Accounts
from controller.dispatch import Demand, Dispatcher, eligible
from controller.generation import Generator
from controller.liveness import Liveness
from controller.metrics import Metrics
from controller.policy import Policy, Random
from controller.registry import Registry, Replica
from controller.settings import ControllerSettings
from protocol.errors import (
    AdapterNotFound,
    InvalidRequest,
    ModelNotFound,
    NoReplicaAvailable,
    TandemError,
)
from protocol.events import NUL_MEDIA_TYPE, SSE_MEDIA_TYPE, NulEncoder, SseDecoder
from protocol.messages import (
    PROTOCOL_VERSION,
    GenerateRequest,
    Heartbeat,
    Lease,
    Registration,
    WorkerStatus,
)
from transport import asgi, refusals


class ModelName(BaseModel):
    """The body of LLaVA's ``/get_worker_address``."""

    model: str


@dataclass(frozen=True, slots=True)
class Controller:
    """The parts of the controller, wired by ``__main__``."""

    settings: ControllerSettings
    registry: Registry
    liveness: Liveness
    dispatcher: Dispatcher
    generator: Generator
    metrics: Metrics
    accounts: Accounts
    policy: Policy
    random: Random
    clock: Callable[[], float]
    status: Callable[[], WorkerStatus | None]  # this controller as a worker of another one


def create_app(controller: Controller) -> ASGIApp:
    """All routes over ``controller``."""
    app = FastAPI(title="Tandem controller", docs_url=None, redoc_url=None)  # they load from a CDN
    refusals.install(app)
    _membership_routes(app, controller)
    _model_routes(app, controller)
    _operator_routes(app, controller)
    return asgi.beside(
        app,
        {
            "/worker_generate_stream": _GenerateStream(controller),
            "/v1/chat/completions": _ChatCompletions(controller),
        },
    )


# ---------------------------------------------------------------- workers


def _membership_routes(app: FastAPI, controller: Controller) -> None:
    @app.post("/register_worker")
    async def register_worker(registration: Registration) -> Lease:
        return await controller.liveness.register(registration)

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(heartbeat: Heartbeat) -> Lease:
        return await controller.liveness.renew(heartbeat)

    @app.post("/refresh_all_workers")
    async def refresh_all_workers() -> None:
        await controller.liveness.refresh()

    @app.post("/worker_get_status")
    async def worker_get_status() -> WorkerStatus:
        """This controller as a worker of another one."""
        status = controller.status()
        if status is None:
            raise NoReplicaAvailable("No worker is registered here yet.", retry_after_s=5)
        return status


# ---------------------------------------------------------------- models


def _model_routes(app: FastAPI, controller: Controller) -> None:
    @app.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": controller.registry.models()}

    @app.get("/v1/models")
    async def v1_models() -> dict[str, Any]:
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "tandem"}
            for name in controller.registry.models()
        ]
        return {"object": "list", "data": models}

    @app.post("/get_worker_address")
    async def get_worker_address(body: ModelName) -> dict[str, str]:
        """Where a LLaVA client would send a request for this model; "" when nowhere."""
        demand = Demand(body.model, None, None, frozenset(), 0.0, 0)
        try:
            replicas = eligible(controller.registry, demand)
        except (AdapterNotFound, ModelNotFound, NoReplicaAvailable):
            return {"address": ""}
        return {"address": controller.policy(replicas, controller.random).address}


# ---------------------------------------------------------------- operators


def _operator_routes(app: FastAPI, controller: Controller) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"state": "ready", "protocol_version": PROTOCOL_VERSION}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await controller.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/cluster")
    async def cluster() -> dict[str, Any]:
        """Workers, load and recent events."""
        now = controller.clock()
        statistics = controller.dispatcher.statistics()
        return {
            "dispatch_method": controller.settings.dispatch_method,
            "models": controller.registry.models(),
            "workers": [_describe(replica, now) for replica in controller.registry],
            "load": {
                "waiting": statistics.waiting,
                "waiting_bytes": statistics.waiting_bytes,
                "inflight": statistics.inflight,
            },
            "events": [
                {
                    "age_s": round(now - event.at, 3),
                    "what": event.what,
                    "worker_id": event.worker_id,
                    "address": event.address,
                    "reason": event.reason,
                }
                for event in reversed(controller.registry.events)
            ],
        }

    @app.post("/workers/{worker_id}/drain")
    async def drain(worker_id: str) -> WorkerStatus:
        """Have a worker finish what runs and take nothing new."""
        return await controller.liveness.command(_worker(controller, worker_id), "drain")

    @app.post("/workers/{worker_id}/resume")
    async def resume(worker_id: str) -> WorkerStatus:
        """Have a drained worker take requests again."""
        return await controller.liveness.command(_worker(controller, worker_id), "resume")


def _worker(controller: Controller, worker_id: str) -> Replica:
    replica = controller.registry.by_worker_id(worker_id)
    if replica is None:
        known = ", ".join(replica.worker_id for replica in controller.registry) or "none"
        raise InvalidRequest(f"No worker {worker_id!r} is registered; there are: {known}.")
    return replica


def _describe(replica: Replica, now: float) -> dict[str, Any]:
    described = replica.status.model_dump(mode="json", exclude={"protocol_version", "epoch"})
    expires_at = replica.expires_at
    return described | {
        "worker_id": replica.worker_id,
        "address": replica.address,
        "models": list(replica.status.model_names),
        "inflight": replica.inflight,
        "inflight_work": round(replica.inflight_work, 1),
        "heartbeat_age_s": round(now - replica.renewed_at, 3),
        "expires_in_s": None if expires_at is None else round(expires_at - now, 3),
        "uptime_s": _uptime_s(replica.status.epoch),
    }


def _uptime_s(epoch: int) -> float | None:
    return round(time.time() - epoch / 1e9, 1) if epoch else None


# ---------------------------------------------------------------- streams


class _GenerateStream:
    """``POST /worker_generate_stream``: LLaVA's route, in either framing."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = asgi.request_id(scope)
        limit_bytes = self._controller.settings.max_body_bytes
        try:
            body = await asgi.read_body(scope, receive, limit_bytes=limit_bytes)
            request = asgi.parse(GenerateRequest, body)
        except asgi.ClientLeft:
            return
        except TandemError as error:
            self._controller.accounts.refused(error, request_id, scope["path"], scope["headers"])
            await asgi.send_error(send, error, _id_header(request_id))
            return
        request_id = request.request_id or request_id
        frames = self._controller.generator.stream(request, body, request_id, scope["headers"])
        sse = asgi.accepts_sse(scope)
        await asgi.respond(
            receive,
            send,
            frames if sse else _cumulative(frames, request.prompt or ""),
            media_type=SSE_MEDIA_TYPE if sse else NUL_MEDIA_TYPE,
            headers=_id_header(request_id),
        )


class _ChatCompletions:
    """``POST /v1/chat/completions``, streamed or whole."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = asgi.request_id(scope)
        headers = _id_header(request_id)
        limit_bytes = self._controller.settings.max_body_bytes
        try:
            body = await asgi.read_body(scope, receive, limit_bytes=limit_bytes)
            asked = asgi.parse(openai.ChatCompletionRequest, body)
            request = asgi.validate(GenerateRequest, asked.as_fields())
        except asgi.ClientLeft:
            return
        except TandemError as error:
            self._controller.accounts.refused(error, request_id, scope["path"], scope["headers"])
            await asgi.send_error(send, error, headers)
            return
        worker_body = request.model_dump_json(exclude_none=True).encode()
        frames = self._controller.generator.stream(
            request, worker_body, request_id, scope["headers"]
        )
        completion = openai.Completion(asked, request_id)
        if asked.stream:
            chunks, media_type = completion.chunks(frames), SSE_MEDIA_TYPE
        else:
            chunks, media_type = completion.whole(frames), "application/json"
        await asgi.respond(receive, send, chunks, media_type=media_type, headers=headers)


async def _cumulative(frames: AsyncGenerator[bytes], prompt: str) -> AsyncGenerator[bytes]:
    """SSE frames as LLaVA's."""
    decoder, encoder = SseDecoder(), NulEncoder(prompt)
    async with aclosing(frames):
        async for data in frames:
            out = b"".join(encoder.encode(event) for event in decoder.feed(data))
            yield asgi.LastChunk(out) if isinstance(data, asgi.LastChunk) else out


def _id_header(request_id: str) -> list[tuple[bytes, bytes]]:
    return [(asgi.REQUEST_ID_HEADER, request_id.encode())]
