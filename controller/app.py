"""The controller's routes, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from controller import fastchat, openapi
from controller.dispatch import Demand, Dispatcher, eligible
from controller.gate import caller_of
from controller.liveness import Liveness
from controller.metrics import Metrics
from controller.openai.requests import ChatCompletionRequest, CompletionRequest
from controller.questions import Questions
from controller.registry import Registry, Replica
from controller.settings import ControllerSettings
from controller.streams import Generate, OpenAI, Serving
from protocol.errors import (
    AdapterNotFound,
    InvalidRequest,
    ModelNotFound,
    NoReplicaAvailable,
)
from protocol.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    Lease,
    Registration,
    WorkerStatus,
)
from transport import asgi, credentials, refusals


class ModelName(BaseModel):
    """The body of LLaVA's ``/get_worker_address``."""

    model: str


class LiveRequest(BaseModel):
    """A request that has not ended. ``place`` 1 is the next of ``waiting`` for its model."""

    state: Literal["waiting", "running"]
    place: int | None
    waiting: int | None
    worker_id: str | None
    kind: str | None
    waited_s: float
    ttft_s: float | None


@dataclass(frozen=True, slots=True)
class Controller:
    """The parts of the controller, wired by ``__main__``."""

    settings: ControllerSettings
    registry: Registry
    liveness: Liveness
    dispatcher: Dispatcher
    serving: Serving
    metrics: Metrics
    questions: Questions
    clock: Callable[[], float]
    status: Callable[[], WorkerStatus | None]  # this controller as a worker of another one


def create_app(controller: Controller) -> asgi.Beside:
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
    fastchat.install(app, controller.registry, controller.serving.intake, controller.questions)
    _operator_routes(app, controller)
    openapi.describe(app)
    serving = controller.serving
    return asgi.Beside(
        app,
        {
            "/worker_generate_stream": Generate(serving, whole=False),
            "/worker_generate": Generate(serving, whole=True),
            "/v1/chat/completions": OpenAI(serving, ChatCompletionRequest),
            "/v1/completions": OpenAI(serving, CompletionRequest),
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
    async def refresh_all_workers(request: Request) -> None:
        """LLaVA's and FastChat's clients ask for it first; only an operator's has an effect."""
        if caller_of(request.scope).operator:
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
    def served(request: Request) -> list[str]:
        """The names that the caller may use."""
        names = controller.serving.intake.names(controller.registry.models())
        return [name for name in names if caller_of(request.scope).allows(name)]

    @app.post("/list_models")
    async def list_models(request: Request) -> dict[str, list[str]]:
        return {"models": served(request)}

    @app.get("/v1/models")
    async def v1_models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in served(request)]}

    @app.get("/v1/models/{name:path}")
    async def v1_model(name: str, request: Request) -> dict[str, Any]:
        if name not in served(request):
            raise ModelNotFound(f"Unknown model {name!r}.", param="model")
        return _model(name)

    @app.get("/requests/{request_id}")
    async def live_request(request_id: str, request: Request) -> LiveRequest:
        """Where a request stands that has not ended, for whoever waits for its first token."""
        account = controller.serving.accounts.live(request_id, caller_of(request.scope))
        place = controller.dispatcher.place(account.demand)
        replica = None if place else account.replica
        return LiveRequest(
            state="waiting" if place else "running",
            place=place[0] if place else None,
            waiting=place[1] if place else None,
            worker_id=replica.worker_id if replica else None,
            kind=replica.status.kind if replica else None,
            waited_s=round(account.waited_s(controller.clock()), 3),
            ttft_s=account.ttft_s,
        )

    @app.post("/get_worker_address")
    async def get_worker_address(body: ModelName, request: Request) -> dict[str, str]:
        """Where LLaVA's and FastChat's clients send their requests for this model: here, as they
        came here, so that these are queued, placed and retried; "" when nobody could serve it.

        A key that came in the address (``http://any:KEY@host:port``) is in this one, too.
        """
        caller_of(request.scope).check_model(body.model)
        demand = Demand(
            controller.serving.intake.resolve(body.model), None, None, frozenset(), 0.0, 0
        )
        try:
            eligible(controller.registry, demand)
        except (AdapterNotFound, ModelNotFound, NoReplicaAvailable):
            return {"address": ""}
        url = request.base_url
        if (key := credentials.presented_in_address(request.scope)) is not None:
            url = url.replace(username="any", password=quote(key, safe=""))
        return {"address": str(url).rstrip("/")}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tandem"}


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
