"""What Gradio's API client may call: ``ask`` and ``models``. Nothing it asks is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from uuid import uuid4

import gradio as gr

from protocol.errors import TandemError
from protocol.events import Delta, Failed
from ui.client import ControllerAway
from ui.model import Settings
from ui.parts import Parts
from ui.talk import fields_of

FRAME_CHARS = 24


def publish(parts: Parts, blocks: gr.Blocks) -> None:
    """Add the public functions to the page's API."""

    async def ask(
        message: str, model: str = "", backend: str = "auto", max_tokens: int = 1024
    ) -> AsyncIterator[str]:
        """Ask one question; the text so far, again and again."""
        view = parts.watch.view
        served = view.bases if view else []
        settings = Settings(
            model=model or (served[0] if served else ""),
            kind=None if backend == "auto" else backend,
            max_tokens=max_tokens,
        )
        if not settings.model:
            raise gr.Error("No model is being served yet; models() lists them.")
        messages = [{"role": "user", "content": message.replace("<image>", "<image >")}]
        text, told = "", 0
        try:
            events = parts.controller.generate(fields_of(settings, messages, [], uuid4().hex))
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Delta):
                        text += event.text
                        if len(text) - told >= FRAME_CHARS:
                            told = len(text)
                            yield text
                    elif isinstance(event, Failed):
                        raise event.error()
        except TandemError as error:
            raise gr.Error(f"{error.message} {error.remedy}") from error
        except ControllerAway as exc:
            raise gr.Error(f"The controller cannot be reached: {exc}.") from exc
        yield text

    async def models() -> list[str]:
        """The models that can be asked now."""
        return parts.watch.view.bases if parts.watch.view else []

    with blocks:
        gr.api(ask, api_name="ask", concurrency_limit=None)
        gr.api(models, api_name="models", queue=False)
