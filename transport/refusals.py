"""Refusals by FastAPI's routes: a typed error is its status and its JSON, as on the raw ones."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from protocol.errors import TandemError
from transport import asgi


def install(app: FastAPI) -> None:
    """Have every ``TandemError`` and every invalid body answered by the one table of errors."""
    app.add_exception_handler(TandemError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_invalid)


async def _refuse(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, TandemError)
    headers = {name.decode(): value.decode() for name, value in asgi.retry_after(exc)}
    return JSONResponse(exc.body(), status_code=exc.status, headers=headers)


async def _refuse_invalid(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    return await _refuse(request, asgi.invalid_request(list(exc.errors())))
