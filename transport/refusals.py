"""Refusals by FastAPI's routes: a typed error is its status and its JSON, as on the raw ones."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from protocol.errors import InvalidRequest, MethodNotAllowed, NotFound, TandemError
from transport import asgi


def install(app: FastAPI) -> None:
    """Have every ``TandemError``, every invalid body and every route that is none answered by the
    one table of errors."""
    app.add_exception_handler(TandemError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse_unrouted)


async def _refuse(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, TandemError)
    headers = {name.decode(): value.decode() for name, value in asgi.retry_after(exc)}
    return JSONResponse(exc.body(), status_code=exc.status, headers=headers)


async def _refuse_invalid(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    return await _refuse(request, asgi.invalid_request(list(exc.errors())))


async def _refuse_unrouted(request: Request, exc: Exception) -> Response:
    """Starlette's own refusals: no such route, not this method, a body that is no JSON."""
    assert isinstance(exc, HTTPException)
    path = request.url.path[:200]
    if exc.status_code == 404:
        return await _refuse(request, NotFound(f"There is no route {path}."))
    if exc.status_code != 405:
        return await _refuse(request, InvalidRequest(f"{exc.detail}."))
    methods: set[str] = set()
    for route in request.app.router.routes:  # Starlette names those of the first one only
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    allowed = ", ".join(sorted(methods))
    error = MethodNotAllowed(f"{path} takes {allowed}, not {request.method}.")
    response = await _refuse(request, error)
    response.headers["allow"] = allowed
    return response
