"""The routes that FastChat's clients expect of a controller or, as it is the address they are
given, of a worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from controller.questions import Questions
from controller.registry import Registry
from protocol.events import Event, SseDecoder


class OfModel(BaseModel):
    """A question about a model; its other fields are for the worker."""

    model: str


class TokensOf(OfModel):
    """The body of ``/count_token``."""

    prompt: str


def install(app: FastAPI, registry: Registry, questions: Questions) -> None:
    """FastChat's routes but those that generate."""

    @app.post("/list_language_models")
    async def list_language_models() -> dict[str, list[str]]:
        """All of them: whoever sees also reads. FastChat's Gradio server offers these."""
        return {"models": registry.models()}

    @app.post("/list_multimodal_models")
    async def list_multimodal_models() -> dict[str, list[str]]:
        seeing = {
            name
            for replica in registry
            if replica.ready and replica.status.capabilities.images
            for name in replica.status.model_names
        }
        return {"models": [name for name in registry.models() if name in seeing]}

    @app.post("/worker_get_conv_template")
    async def conv_template(body: OfModel) -> dict[str, Any]:
        return await questions.ask(body.model, "/worker_get_conv_template", body.model_dump())

    @app.post("/count_token")
    async def count_token(body: TokensOf) -> dict[str, Any]:
        return await questions.ask(body.model, "/count_token", body.model_dump())

    @app.post("/model_details")
    async def model_details(body: OfModel) -> dict[str, Any]:
        return await questions.ask(body.model, "/model_details", body.model_dump())


async def events_of(frames: AsyncGenerator[bytes]) -> AsyncGenerator[Event]:
    """The events of whole SSE frames."""
    decoder = SseDecoder()
    async with aclosing(frames):
        async for data in frames:
            for event in decoder.feed(data):
                yield event
