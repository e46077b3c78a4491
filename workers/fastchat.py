"""What FastChat asks of a worker beside a stream, over any engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protocol.errors import InvalidRequest, Unsupported
from protocol.messages import IMAGE_PLACEHOLDER, GenerateRequest
from workers.conversation import PICTURE, Conversation, derive
from workers.engine import Engine, EngineInfo


class FastChat:
    """A worker as FastChat's servers see it; ``running`` raises while the engine is not."""

    def __init__(self, engine: Engine, name: str, running: Callable[[], EngineInfo]) -> None:
        self._engine = engine
        self._name = name
        self._running = running
        self._conversation: Conversation | InvalidRequest | Unsupported | None = None

    async def template(self) -> dict[str, Any]:
        """FastChat's ``Conversation`` of this model.

        Raises:
            InvalidRequest, Unsupported: the model has none that FastChat could follow.
            EngineFailed, NoReplicaAvailable: the engine is not running, or not yet.
        """
        conversation = await self._derived()
        if not isinstance(conversation, Conversation):
            raise conversation
        return conversation.wire(self._name)

    async def count_tokens(self, prompt: str) -> int:
        """The tokens of a prompt that FastChat has written; raises as ``template``."""
        self._running()
        return await self._engine.count_tokens(await self._own(prompt))

    def context_length(self) -> int:
        """Tokens of a prompt and its answer together; raises as ``template``."""
        return self._running().context_length

    async def own(self, request: GenerateRequest) -> GenerateRequest:
        """``request`` with the prompt as the model's template writes it, if FastChat wrote it.

        Raises:
            Unsupported: it has a system message, and the template takes none.
            EngineFailed, NoReplicaAvailable: the engine is not running, or not yet.
        """
        if request.prompt is None or (request.echo and PICTURE not in request.prompt):
            return request
        return request.model_copy(update={"prompt": await self._own(request.prompt)})

    async def _own(self, prompt: str) -> str:
        conversation = await self._derived()
        if isinstance(conversation, Conversation):
            prompt = conversation.prompt_of(prompt)
        return prompt.replace(PICTURE, IMAGE_PLACEHOLDER)

    async def _derived(self) -> Conversation | InvalidRequest | Unsupported:
        self._running()
        if self._conversation is None:
            try:
                self._conversation = await derive(self._engine.write)
            except (InvalidRequest, Unsupported) as error:
                self._conversation = error
        return self._conversation
