"""The controller as the chat page sees it; nothing else of the cluster is ever asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any, Literal
from urllib.parse import quote

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr, ValidationError

from protocol.errors import EngineFailed, NotFound, TandemError, UpstreamLost, from_wire
from protocol.events import SSE_MEDIA_TYPE, Delta, Event, SseDecoder
from protocol.messages import Message, WorkerStatus
from transport import credentials

CONTROL_TIMEOUT_S = 5.0
EVENT_TIMEOUT_S = 330.0
"""Longer than the controller's own limits: what it has to say about a wait should arrive."""


class ControllerAway(Exception):
    """The controller cannot be reached; the message says how that shows."""


class WorkerView(WorkerStatus):
    """A worker as ``GET /cluster`` describes it."""

    address: str = ""
    inflight: int = 0
    heartbeat_age_s: float = 0.0
    uptime_s: float | None = None


class Load(Message):
    waiting: int = 0
    inflight: int = 0


class ClusterEvent(Message):
    age_s: float
    what: str
    worker_id: str | None = None
    reason: str | None = None


class ClusterView(Message):
    """``GET /cluster``."""

    models: tuple[str, ...] = ()
    workers: tuple[WorkerView, ...] = ()
    load: Load = Load()
    events: tuple[ClusterEvent, ...] = ()

    @property
    def ready(self) -> tuple[WorkerView, ...]:
        return tuple(worker for worker in self.workers if worker.state == "ready")

    @property
    def bases(self) -> list[str]:
        """The models that ready workers serve, without those that are another with an adapter."""
        return list(dict.fromkeys(name for worker in self.ready for name in worker.bases))

    def adapters(self, model: str | None) -> list[str]:
        """The adapters that ready workers of ``model`` have loaded."""
        serving = [worker for worker in self.ready if model in worker.bases]
        return list(dict.fromkeys(name for worker in serving for name in worker.adapters))

    def kinds(self, model: str | None) -> list[str]:
        """The kinds of the ready workers of ``model``."""
        return list(dict.fromkeys(w.kind for w in self.ready if model in w.bases))


class RequestState(Message):
    """``GET /requests/{request_id}``: where a request is while it lives."""

    state: Literal["waiting", "running"]
    place: int | None = None  # 1 is the next to be placed
    waiting: int | None = None
    worker_id: str | None = None
    kind: str | None = None


class Controller:
    """The calls of this page to its controller."""

    def __init__(self, address: str, *, token: SecretStr | None = None) -> None:
        self.address = address
        self._http = httpx.AsyncClient(
            base_url=address,
            headers=credentials.headers(token),
            timeout=CONTROL_TIMEOUT_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def cluster(self) -> ClusterView:
        """Workers, load and events; raises as ``_call`` does."""
        try:
            return ClusterView.model_validate(await self._call("GET", "/cluster"))
        except ValidationError as exc:
            raise ControllerAway("what it says of its workers cannot be read") from exc

    async def request(self, request_id: str) -> RequestState | None:
        """Where this request is; ``None`` when the controller does not say."""
        try:
            path = f"/requests/{quote(request_id, safe='')}"
            return RequestState.model_validate(await self._call("GET", path))
        except (NotFound, ValidationError):
            return None

    async def command(self, worker_id: str, command: Literal["drain", "resume"]) -> None:
        """Drain or resume a worker; raises as ``_call`` does."""
        await self._call("POST", f"/workers/{quote(worker_id, safe='')}/{command}")

    async def samples(self) -> dict[str, float]:
        """The controller's metrics, each summed over its labels but the outcome of a request and
        the bucket of a time to first token.

        Raises:
            ControllerAway: it does not answer.
        """
        try:
            response = await self._http.get("/metrics")
        except httpx.HTTPError as exc:
            raise ControllerAway(_reason(exc)) from exc
        found: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(response.text if response.is_success else ""):
            for sample in family.samples:
                name = sample.name
                if name == "tandem_time_to_first_token_seconds_bucket":
                    name = f"ttft<={sample.labels['le']}"
                elif name == "tandem_requests_total":
                    name = f"outcome={sample.labels['outcome']}"
                found[name] += sample.value  # of all models together
        return found

    async def generate(
        self, fields: dict[str, Any], on_worker: Callable[[str, str], None] | None = None
    ) -> AsyncGenerator[Event]:
        """The events of one answer; closing the iterator cancels it, end to end.

        ``on_worker`` is told the id and the kind of the worker before the first event.

        Raises:
            TandemError: a refusal, before the first event.
            ControllerAway: it cannot be reached, or was lost before the terminal event.
        """
        decoder, ended = SseDecoder(), False
        timeout = httpx.Timeout(CONTROL_TIMEOUT_S, read=EVENT_TIMEOUT_S)
        async with AsyncExitStack() as stack:
            try:
                response = await stack.enter_async_context(
                    self._http.stream(
                        "POST",
                        "/worker_generate_stream",
                        json=fields,
                        headers={"accept": SSE_MEDIA_TYPE},
                        timeout=timeout,
                    )
                )
                if not response.is_success:
                    raise _refusal(response.status_code, await response.aread())
                worker_id = response.headers.get("x-tandem-worker")
                if worker_id and on_worker is not None:
                    on_worker(worker_id, response.headers.get("x-tandem-kind", ""))
                async for data in response.aiter_raw():
                    for event in decoder.feed(data):
                        ended = not isinstance(event, Delta)
                        yield event
            except httpx.HTTPError as exc:
                raise ControllerAway(_reason(exc)) from exc
            if not ended:
                raise ControllerAway("it closed the connection in mid-answer")

    async def _call(self, method: str, path: str) -> Any:
        """The JSON of an answer.

        Raises:
            TandemError: the controller refuses.
            ControllerAway: it does not answer.
        """
        try:
            response = await self._http.request(method, path)
        except httpx.HTTPError as exc:
            raise ControllerAway(_reason(exc)) from exc
        if not response.is_success:
            raise _refusal(response.status_code, response.content)
        try:
            return response.json()
        except ValueError as exc:
            raise ControllerAway("what answers there is no controller") from exc


def _refusal(status: int, body: bytes) -> TandemError:
    """The error of a refusal; one that is not ours is told by its status."""
    try:
        response = httpx.Response(status, content=body)
        error = response.json()["error"]
        return from_wire(
            error["code"], error["message"], error.get("remedy"), error.get("retry_after_s")
        )
    except (ValueError, KeyError, TypeError):
        if status == 404:
            return NotFound(f"The controller has no such thing (HTTP {status}).")
        if status in (502, 503, 504):
            return UpstreamLost(f"Something before the controller answered with HTTP {status}.")
        return EngineFailed(f"The controller answered with HTTP {status}.")


def _reason(exc: httpx.HTTPError) -> str:
    if isinstance(exc, httpx.ConnectError):
        return "nobody listens there"
    if isinstance(exc, httpx.TimeoutException):
        return "it did not answer in time"
    return "the connection broke"
