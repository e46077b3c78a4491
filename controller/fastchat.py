"""The routes that FastChat's clients expect of a controller or, as it is the address they are
given, of a worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel

from controller.gate import caller_of
from controller.intake import Intake
from controller.questions import Questions
from controller.registry import Registry
from protocol.events import Event, SseDecoder


class OfModel(BaseModel):
    """A question about a model; its other fields are for the worker."""

    model: str


class TokensOf(OfModel):
    """The body of ``/count_token``."""

    prompt: str


def install(app: FastAPI, registry: Registry, intake: Intake, questions: Questions) -> None:
    """FastChat's routes but those that generate."""

    def allowed(request: Request, models: Iterable[str]) -> dict[str, list[str]]:
        caller = caller_of(request.scope)
        return {"models": [name for name in intake.names(models) if caller.allows(name)]}

    async def ask(path: str, body: OfModel, request: Request) -> dict[str, Any]:
        caller_of(request.scope).check_model(body.model)
        named = body.model_copy(update={"model": intake.resolve(body.model)})
        return await questions.ask(named.model, path, named.model_dump())

    @app.post("/list_language_models")
    async def list_language_models(request: Request) -> dict[str, list[str]]:
        """All of them: whoever sees also reads. FastChat's Gradio server offers these."""
        return allowed(request, registry.models())

    @app.post("/list_multimodal_models")
    async def list_multimodal_models(request: Request) -> dict[str, list[str]]:
        seeing = {
            name
            for replica in registry
            if replica.ready and replica.status.capabilities.images
            for name in replica.status.model_names
        }
        return allowed(request, (name for name in registry.models() if name in seeing))

    @app.get("/test_connection")
    async def test_connection() -> str:
        return "success"

    @app.post("/worker_get_conv_template")
    async def conv_template(body: OfModel, request: Request) -> dict[str, Any]:
        return await ask("/worker_get_conv_template", body, request)

    @app.post("/count_token")
    async def count_token(body: TokensOf, request: Request) -> dict[str, Any]:
        return await ask("/count_token", body, request)

    @app.post("/model_details")
    async def model_details(body: OfModel, request: Request) -> dict[str, Any]:
        return await ask("/model_details", body, request)


async def events_of(frames: AsyncGenerator[bytes]) -> AsyncGenerator[Event]:
    """The events of whole SSE frames."""
    decoder = SseDecoder()
    async with aclosing(frames):
        async for data in frames:
            for event in decoder.feed(data):
                yield event
