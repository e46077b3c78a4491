"""What ``/openapi.json`` says of the routes that FastAPI does not serve, and of every refusal."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from controller.openai.requests import ChatCompletionRequest, CompletionRequest
from protocol.errors import ERRORS
from protocol.events import NUL_MEDIA_TYPE, SSE_MEDIA_TYPE
from protocol.messages import GenerateRequest


class Refusal(BaseModel):
    """What went wrong, in OpenAI's shape with our code and a remedy."""

    code: str = Field(description="one of: " + ", ".join(ERRORS))
    type: str = Field(description="request_error, capacity_error or serving_error")
    message: str
    param: str | None = Field(default=None, description="the field at fault")
    remedy: str
    retry_after_s: float | None = None


class ErrorBody(BaseModel):
    """The body of every refusal; ``text`` and ``error_code`` repeat it for LLaVA's clients."""

    error: Refusal
    text: str
    error_code: int


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": "; ".join(codes)}
    for status in sorted({error.status for error in ERRORS.values()})
    for codes in [[code for code, error in ERRORS.items() if error.status == status]]
}


def describe(app: FastAPI) -> None:
    """Add the streaming routes to the description; their requests never reach FastAPI."""
    whole_or_streamed = ("application/json", SSE_MEDIA_TYPE)
    _add(app, "/v1/chat/completions", ChatCompletionRequest, whole_or_streamed)
    _add(app, "/v1/completions", CompletionRequest, whole_or_streamed)
    _add(app, "/worker_generate_stream", GenerateRequest, (SSE_MEDIA_TYPE, NUL_MEDIA_TYPE))
    _add(app, "/worker_generate", GenerateRequest, ("application/json",))


def _add(app: FastAPI, path: str, body: type[BaseModel], media_types: tuple[str, ...]) -> None:
    async def served_beside(request: BaseModel) -> None:
        raise NotImplementedError  # transport.asgi.Beside takes the request out before

    served_beside.__annotations__["request"] = body
    content: dict[str, Any] = {media_type: {"schema": {}} for media_type in media_types}
    app.add_api_route(
        path,
        served_beside,
        methods=["POST"],
        name=path.strip("/").replace("/", "_"),
        response_model=None,
        responses={200: {"description": "the answer", "content": content}},
    )
