"""The interface every worker kind implements: what turns a request into tokens.

The shell has already validated the request, decoded its images, checked the capabilities it
needs and taken one of ``capacity`` slots; it turns a ``TandemError`` raised by the engine into a
refusal (before the first event) or a ``Failed`` event (after it).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from protocol.events import Delta, Finished
from protocol.messages import CacheStatus, Capabilities, ChatMessage, GenerateRequest
from workers.images import Picture

Progress = Callable[[str], None]
"""Called by a starting engine with a few words on what it does now."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a started engine is; fixed for its life."""

    capacity: int  # requests decoded at once
    context_length: int  # tokens, prompt and answer together
    capabilities: Capabilities
    precision: str  # of the weights: "float32", "bfloat16", "nf4", ...
    device: str  # "cpu", "cuda:0", ...
    weight_bytes: int | None = None  # that the weights take
    unquantized_bytes: int | None = None  # that they would take had they not been quantized here
    image_tokens: int = 0  # tokens an image takes, for estimates of work
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says of its work, beside what the shell counts."""

    tokens_per_s: float | None = None  # decoded by all requests together while it was busy
    others_running: int = 0  # requests that reached it past this worker
    others_waiting: int = 0
    token_age_s: float | None = None  # since it last made a token; idle ones are asked for one


class Engine(Protocol):
    """One loaded model. Lives on one event loop; none of its coroutines may block it."""

    async def start(self, progress: Progress) -> EngineInfo:
        """Load everything; return when the first request can be served.

        Raises:
            EngineFailed: the model cannot be loaded or served; the message says what to do.
        """
        ...

    def generate(
        self, request: GenerateRequest, images: Sequence[Picture]
    ) -> AsyncGenerator[Delta | Finished]:
        """Yield ``Delta* Finished``; closing the generator aborts the work within 100 ms.

        Raises:
            AdapterNotFound, ContextOverflow, InvalidRequest, Unsupported: the request cannot be
                served.
            EngineFailed, OutOfMemory: it could not be served.
        """
        ...

    async def count_tokens(self, text: str) -> int:
        """How many tokens a ready prompt has, each ``<image>`` an image of the usual size.

        Raises:
            EngineFailed: it is not running.
        """
        ...

    async def write(self, turns: Sequence[ChatMessage]) -> str:
        """The ready prompt that is read as these turns: what the chat template makes of them,
        without what the tokenizer puts before every prompt, and ``<image>`` for each image.

        Raises:
            InvalidRequest, Unsupported: there is no chat template, or it refuses the turns.
            EngineFailed: the engine is not running.
        """
        ...

    async def failed(self) -> None:
        """Return never while the engine is well.

        Raises:
            EngineFailed: it has died; raised within 2 s of its death.
        """
        ...

    def load(self) -> EngineLoad:
        """Its own figures, as far as it has any."""
        ...

    def cache(self) -> CacheStatus | None:
        """The prefix cache now; ``None`` when there is none."""
        ...

    async def flush_cache(self) -> None:
        """Empty the prefix cache.

        Raises:
            Overloaded: requests run.
            Unsupported: there is none.
            EngineFailed: it could not be done.
        """
        ...

    def adapters(self) -> tuple[str, ...]:
        """The names of the LoRA adapters that requests can choose now."""
        ...

    async def load_adapter(self, name: str, path: str) -> None:
        """Let requests choose ``name``, the adapter at ``path``: a directory or a hub id.

        Raises:
            InvalidRequest: the name is taken, or what is at ``path`` does not fit.
            Unsupported: this engine takes none.
            EngineFailed: it cannot be held; nothing has changed in any of these cases.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Free ``name`` when the answers that use it have ended.

        Raises:
            AdapterNotFound: it is not loaded.
            InvalidRequest, Unsupported: this engine does not let it go.
        """
        ...

    async def aclose(self) -> None:
        """Stop and release everything; harmless when repeated or when ``start`` failed."""
        ...
