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

from controller import openapi
from controller.dispatch import Demand, Dispatcher, eligible
from controller.fetch import ImageFetcher
from controller.generation import Generator
from controller.intake import Intake
from controller.liveness import Liveness
from controller.metrics import Metrics
from controller.openai.answers import Answer
from controller.openai.requests import ChatCompletionRequest, CompletionRequest
from controller.policy import Policy, Random
from controller.registry import Registry, Replica
from controller.settings import ControllerSettings
from protocol.errors import (
    AdapterNotFound,
    InvalidRequest,
    ModelNotFound,
    NoReplicaAvailable,
    TandemError,
    TooLarge,
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

_BODIES_OF_CHOICES = 4
"""Bodies of the largest size that the choices of one request may take together."""


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
    intake: Intake
    fetcher: ImageFetcher
    generator: Generator
    metrics: Metrics
    policy: Policy
    random: Random
    clock: Callable[[], float]
    status: Callable[[], WorkerStatus | None]  # this controller as a worker of another one


def create_app(controller: Controller) -> ASGIApp:
    """All routes over ``controller``."""
    app = FastAPI(
        title="Tandem controller",
        docs_url=None,  # these load from a CDN
        redoc_url=None,
        responses=openapi.ERROR_RESPONSES,
    )
    refusals.install(app)
    _membership_routes(app, controller)
    _model_routes(app, controller)
    _operator_routes(app, controller)
    openapi.describe(app)
    return asgi.beside(
        app,
        {
            "/worker_generate_stream": _GenerateStream(controller),
            "/v1/chat/completions": _OpenAI(controller, ChatCompletionRequest),
            "/v1/completions": _OpenAI(controller, CompletionRequest),
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
    def served() -> list[str]:
        return controller.intake.names(controller.registry.models())

    @app.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": served()}

    @app.get("/v1/models")
    async def v1_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in served()]}

    @app.get("/v1/models/{name:path}")
    async def v1_model(name: str) -> dict[str, Any]:
        if name not in served():
            raise ModelNotFound(f"Unknown model {name!r}.", param="model")
        return _model(name)

    @app.post("/get_worker_address")
    async def get_worker_address(body: ModelName) -> dict[str, str]:
        """Where a LLaVA client would send a request for this model; "" when nowhere."""
        demand = Demand(controller.intake.resolve(body.model), None, None, frozenset(), 0.0, 0)
        try:
            replicas = eligible(controller.registry, demand)
        except (AdapterNotFound, ModelNotFound, NoReplicaAvailable):
            return {"address": ""}
        return {"address": controller.policy(replicas, controller.random).address}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tandem"}


# ---------------------------------------------------------------- operators


def _operator_routes(app: FastAPI, controller: Controller) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"state": "ready", "protocol_version": PROTOCOL_VERSION}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(controller.metrics.text(), media_type=CONTENT_TYPE_LATEST)

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
            asked = asgi.parse(GenerateRequest, body)
            request = self._controller.intake.accept(asked)
        except asgi.ClientLeft:
            return
        except TandemError as error:
            await asgi.send_error(send, error, _id_header(request_id))
            return
        if request is not asked:
            body = _dumped(request)
        request_id = request.request_id or request_id
        frames = self._controller.generator.stream(request, body, request_id)
        sse = asgi.accepts_sse(scope)
        await asgi.respond(
            receive,
            send,
            frames if sse else _cumulative(frames, request.prompt or ""),
            media_type=SSE_MEDIA_TYPE if sse else NUL_MEDIA_TYPE,
            headers=_id_header(request_id),
        )


class _OpenAI:
    """One of OpenAI's routes, streamed or whole."""

    def __init__(
        self, controller: Controller, shape: type[ChatCompletionRequest | CompletionRequest]
    ) -> None:
        self._controller = controller
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = asgi.request_id(scope)
        headers = _id_header(request_id)
        limit_bytes = self._controller.settings.max_body_bytes
        try:
            body = await asgi.read_body(scope, receive, limit_bytes=limit_bytes)
            asked = asgi.parse(self._shape, body)
            requests = self._requests(asked, len(body))
            named_by_address = self._controller.fetcher.check(requests[0].images)
        except asgi.ClientLeft:
            return
        except TandemError as error:
            await asgi.send_error(send, error, headers)
            return
        answered = self._fetched if named_by_address else self._answered
        await asgi.respond(
            receive,
            send,
            answered(asked, requests, request_id),
            media_type=SSE_MEDIA_TYPE if asked.stream else "application/json",
            headers=headers,
        )

    def _requests(
        self, asked: ChatCompletionRequest | CompletionRequest, body_bytes: int
    ) -> list[GenerateRequest]:
        """One of our requests for each answer; raises ``RequestError``."""
        settings, intake = self._controller.settings, self._controller.intake
        requests = [
            intake.accept(asgi.validate(GenerateRequest, fields))
            for fields in asked.as_fields(settings.max_tokens)
        ]
        if body_bytes * len(requests) > _BODIES_OF_CHOICES * settings.max_body_bytes:
            raise TooLarge(
                f"n: {len(requests)} answers to a body of {body_bytes} bytes are too many.",
                remedy="Ask for fewer at once.",
                param="n",
            )
        return requests

    def _answered(
        self,
        asked: ChatCompletionRequest | CompletionRequest,
        requests: list[GenerateRequest],
        request_id: str,
    ) -> AsyncGenerator[bytes]:
        streams = [
            self._controller.generator.stream(
                request, _dumped(request), f"{request_id}-{index}" if index else request_id
            )
            for index, request in enumerate(requests)
        ]
        answer = Answer(asked, request_id)
        return answer.chunks(streams) if asked.stream else answer.whole(streams)

    async def _fetched(
        self,
        asked: ChatCompletionRequest | CompletionRequest,
        requests: list[GenerateRequest],
        request_id: str,
    ) -> AsyncGenerator[bytes]:
        """As ``_answered``, after the images that are named by address have been fetched."""
        images = {"images": await self._controller.fetcher.fetched(requests[0].images)}
        whole = [request.model_copy(update=images) for request in requests]
        async with aclosing(self._answered(asked, whole, request_id)) as chunks:
            async for chunk in chunks:
                yield chunk


def _dumped(request: GenerateRequest) -> bytes:
    return request.model_dump_json(exclude_none=True).encode()


async def _cumulative(frames: AsyncGenerator[bytes], prompt: str) -> AsyncGenerator[bytes]:
    """SSE frames as LLaVA's."""
    decoder, encoder = SseDecoder(), NulEncoder(prompt)
    async with aclosing(frames):
        async for data in frames:
            out = b"".join(encoder.encode(event) for event in decoder.feed(data))
            yield asgi.LastChunk(out) if isinstance(data, asgi.LastChunk) else out


def _id_header(request_id: str) -> list[tuple[bytes, bytes]]:
    return [(asgi.REQUEST_ID_HEADER, request_id.encode())]
