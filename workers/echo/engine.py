"""An engine that repeats its prompt byte by byte: deterministic, and honest about Unicode.

A token is a UTF-8 byte, so characters span tokens as with a real byte-level tokenizer; ``END``
ends the answer as a model's end-of-sequence token does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from protocol.errors import ContextOverflow, EngineFailed, Unsupported, from_wire
from protocol.events import Delta, Finished
from protocol.messages import (
    IMAGE_PLACEHOLDER,
    CacheStatus,
    Capabilities,
    ChatMessage,
    GenerateRequest,
    TextPart,
)
from workers.echo.settings import EchoSettings
from workers.engine import EngineInfo, EngineLoad, Progress
from workers.images import Picture
from workers.prompts import check_resumable
from workers.text import TextStream

END = 256
IMAGE_TOKENS = 16


def decode(ids: Sequence[int]) -> str:
    return bytes(token for token in ids if token != END).decode("utf-8", "replace")


class EchoEngine:
    """Repeats the prompt, or the text of the last message."""

    kind = "echo"

    def __init__(self, settings: EchoSettings) -> None:
        self._settings = settings
        self._left = settings.die_after  # tokens until the engine dies
        self._died = asyncio.Event()

    async def start(self, progress: Progress) -> EngineInfo:
        return EngineInfo(
            capacity=64,
            context_length=self._settings.context_length,
            capabilities=Capabilities(chat=True, images=True, seed=True, resume=True),
            precision="none",
            device="cpu",
            image_tokens=IMAGE_TOKENS,
        )

    async def generate(
        self, request: GenerateRequest, images: Sequence[Picture]
    ) -> AsyncGenerator[Delta | Finished]:
        check_resumable(request.resume_token_ids, vocab_size=END + 1, image_token_id=None)
        prompt_tokens = request.prompt_chars + IMAGE_TOKENS * len(images)
        room = self._settings.context_length - prompt_tokens
        if room < 1:
            raise ContextOverflow(
                f"{prompt_tokens} prompt tokens; this worker's context has "
                f"{self._settings.context_length}."
            )
        answer = [*_answer(request).encode(), END][: min(request.max_new_tokens, room)]
        text = TextStream(decode, request.stop)
        made = list(request.resume_token_ids)
        text.push(made)
        delay_s = self._settings.first_delay_s
        for token in answer[len(made) :]:
            if text.stopped:
                break
            await asyncio.sleep(delay_s)
            delay_s = self._settings.delay_s
            self._fail_if_due(len(made))
            made.append(token)
            yield Delta(text=text.push([token]), token_ids=(token,))
        if rest := text.flush():
            yield Delta(text=rest)
        ended = text.stopped or made[-1:] == [END]
        yield Finished(
            reason="stop" if ended else "length",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(made),
        )

    def _fail_if_due(self, made: int) -> None:
        if self._settings.fail_after is not None and made >= self._settings.fail_after:
            raise from_wire(self._settings.fail_with, "The echo engine fails as it was told to.")
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self._died.set()
                raise EngineFailed("The echo engine has died as it was told to.")

    async def count_tokens(self, text: str) -> int:
        placeholders = text.count(IMAGE_PLACEHOLDER)
        return len(text) + placeholders * (IMAGE_TOKENS - len(IMAGE_PLACEHOLDER))

    async def write(self, turns: Sequence[ChatMessage]) -> str:
        """As LLaVA's first models read them."""
        ends = {"system": " ", "user": " ", "assistant": "</s>"}
        labels = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
        said = (labels[turn.role] + _said(turn) + ends[turn.role] for turn in turns)
        return "".join(said) + "ASSISTANT:"

    async def failed(self) -> None:
        await self._died.wait()
        raise EngineFailed("The echo engine has died as it was told to.")

    def load(self) -> EngineLoad:
        return EngineLoad()

    def cache(self) -> CacheStatus | None:
        return None

    async def flush_cache(self) -> None:
        raise Unsupported("The echo engine has no cache to flush.")

    def adapters(self) -> tuple[str, ...]:
        return ()

    async def load_adapter(self, name: str, path: str) -> None:
        raise Unsupported("The echo engine has no weights to adapt.")

    async def unload_adapter(self, name: str) -> None:
        raise Unsupported("The echo engine has no weights to adapt.")

    async def aclose(self) -> None:
        pass


def _answer(request: GenerateRequest) -> str:
    if request.prompt is not None:
        return request.prompt
    assert request.messages is not None
    parts = request.messages[-1].parts
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def _said(turn: ChatMessage) -> str:
    return "".join(
        part.text if isinstance(part, TextPart) else f"{IMAGE_PLACEHOLDER}\n" for part in turn.parts
    )
