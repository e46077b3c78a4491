"""The worker's routes, over any engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from protocol.errors import TandemError
from protocol.events import (
    NUL_MEDIA_TYPE,
    SSE_MEDIA_TYPE,
    Event,
    NulEncoder,
    encode_sse,
    is_terminal,
)
from protocol.logs import request_id_var
from protocol.messages import AdapterSource, GenerateRequest, WorkerState, WorkerStatus
from transport import asgi, fastchat, refusals
from transport.tracing import Headers
from workers.shell import Shell


class ReadyPrompt(BaseModel):
    """The body of FastChat's ``/count_token``."""

    prompt: str


def create_app(shell: Shell) -> asgi.Beside:
    """All routes over ``shell``."""
    app = FastAPI(title="Tandem worker", openapi_url=None)
    refusals.install(app)

    @app.post("/worker_get_status")
    async def get_status() -> WorkerStatus:
        return shell.status()

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        ready = shell.state is WorkerState.READY
        body: dict[str, Any] = {"state": shell.state.value}
        if shell.state is WorkerState.STARTING:
            body["progress"] = shell.progress
        elif (age_s := shell.token_age_s) is not None:
            body["token_age_s"] = round(age_s, 1)
        return JSONResponse(body, status_code=200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await shell.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/drain")
    async def drain() -> WorkerStatus:
        shell.drain()
        return shell.status()

    @app.post("/resume")
    async def resume() -> WorkerStatus:
        shell.resume()
        return shell.status()

    @app.post("/flush_cache")
    async def flush_cache() -> WorkerStatus:
        await shell.flush_cache()
        return shell.status()

    @app.get("/adapters")
    async def adapters() -> dict[str, tuple[str, ...]]:
        return {"adapters": shell.adapters()}

    @app.post("/adapters")
    async def load_adapter(source: AdapterSource) -> WorkerStatus:
        await shell.load_adapter(source)
        return shell.status()

    @app.delete("/adapters/{name}")
    async def unload_adapter(name: str) -> WorkerStatus:
        await shell.unload_adapter(name)
        return shell.status()

    _fastchat_routes(app, shell)
    return asgi.Beside(
        app,
        {
            "/worker_generate_stream": _Generate(shell, whole=False),
            "/worker_generate": _Generate(shell, whole=True),
        },
    )


def _fastchat_routes(app: FastAPI, shell: Shell) -> None:
    @app.post("/worker_get_conv_template")
    async def conv_template() -> dict[str, Any]:
        return {"conv": await shell.fastchat.template()}

    @app.post("/count_token")
    async def count_token(body: ReadyPrompt) -> dict[str, int]:
        return {"count": await shell.fastchat.count_tokens(body.prompt), "error_code": 0}

    @app.post("/model_details")
    async def model_details() -> dict[str, int]:
        return {"context_length": shell.fastchat.context_length()}


class _Generate:
    """``POST /worker_generate_stream``, or FastChat's ``/worker_generate`` with the ``whole``
    answer in one piece, as a raw ASGI endpoint."""

    def __init__(self, shell: Shell, *, whole: bool) -> None:
        self._shell = shell
        self._whole = whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = asgi.request_id(scope)
        headers = [(asgi.REQUEST_ID_HEADER, request_id.encode())]
        limit = self._shell.max_body_bytes
        sse = asgi.accepts_sse(scope) and not self._whole
        media_type = "application/json" if self._whole else NUL_MEDIA_TYPE
        body = b""
        try:
            body = await asgi.read_body(scope, receive, limit_bytes=limit)
            request = asgi.parse(GenerateRequest, body)
        except TandemError as error:
            self._shell.metrics.refused(error.code)
            if sse or not fastchat.has_sent(body):
                await asgi.send_error(send, error, headers)
                return
            told = fastchat.refusal(error, whole=self._whole)
            await asgi.respond(receive, send, told, media_type=media_type, headers=headers)
            return
        except asgi.ClientLeft:
            return
        if request.request_id is not None:
            request_id = request.request_id
            headers = [(asgi.REQUEST_ID_HEADER, request_id.encode())]
        request_id_var.set(request_id)
        await asgi.respond(
            receive,
            send,
            self._encoded(request, encode_sse, scope["headers"])
            if sse
            else self._in_their_words(request, scope["headers"]),
            media_type=SSE_MEDIA_TYPE if sse else media_type,
            headers=headers,
        )

    def _in_their_words(self, request: GenerateRequest, headers: Headers) -> AsyncGenerator[bytes]:
        prompt = (request.prompt or "") if request.echo else ""
        if self._whole:
            return fastchat.whole(self._shell.generate(request, headers), prompt)
        chunks = self._encoded(request, NulEncoder(prompt).encode, headers)
        return chunks if request.echo else fastchat.failures_as_frames(chunks, prompt)

    async def _encoded(
        self, request: GenerateRequest, encode: Callable[[Event], bytes], headers: Headers
    ) -> AsyncGenerator[bytes]:
        async with aclosing(self._shell.generate(request, headers)) as events:
            async for event in events:
                data = encode(event)
                yield asgi.LastChunk(data) if is_terminal(event) else data
