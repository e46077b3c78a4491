"""The Hugging Face engine: one generation thread a request, bridged to the event loop.

This module imports neither torch nor transformers; ``start`` does.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

import anyio

from protocol.errors import EngineFailed
from protocol.events import Delta, Finished
from protocol.messages import CacheStatus, Capabilities, GenerateRequest
from workers.engine import EngineInfo, Progress
from workers.hf.settings import HfSettings
from workers.images import Picture

if TYPE_CHECKING:
    from workers.hf.model import HfModel

log = logging.getLogger(__name__)

STOP_S = 10.0
"""How long a closed request may take to leave its thread; one layer of the network as a rule."""

T = TypeVar("T")


class HfEngine:
    """Serves one transformers model; requests decode side by side, each in its own thread."""

    kind = "hf"

    def __init__(self, settings: HfSettings) -> None:
        self._settings = settings
        self._capacity = settings.limit_model_concurrency
        self._threads = ThreadPoolExecutor(self._capacity, thread_name_prefix="generation")
        self._model: HfModel | None = None
        self._running: dict[asyncio.Future[Finished], threading.Event] = {}
        self._dead = asyncio.Event()

    async def start(self, progress: Progress) -> EngineInfo:
        """Load the model and generate once.

        Raises:
            EngineFailed: the model cannot be loaded or does not generate.
        """
        loop = asyncio.get_running_loop()

        def report(words: str) -> None:
            loop.call_soon_threadsafe(progress, words)

        progress("importing torch and transformers")
        self._model, info = await self._in_thread(lambda: self._start(report))
        return info

    def _start(self, progress: Progress) -> tuple[HfModel, EngineInfo]:
        import torch
        import transformers

        from workers.hf.generation import warm_up
        from workers.hf.model import load

        model = load(self._settings, progress)
        progress("warming up")
        # Alone, because some weights are repacked within the first forward pass.
        image_tokens = warm_up(model)
        return model, EngineInfo(
            capacity=self._capacity,
            context_length=model.context_length,
            capabilities=Capabilities(
                chat=model.apply_template is not None,
                images=model.image_token is not None,
                seed=True,
                resume=True,
            ),
            precision=model.precision,
            device=str(model.device),
            image_tokens=image_tokens,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )

    async def generate(
        self, request: GenerateRequest, images: Sequence[Picture]
    ) -> AsyncGenerator[Delta | Finished]:
        """Yield ``Delta* Finished``, a delta for each token.

        Closing the generator stops the computation and waits for its thread, so that a slot is
        free only when its thread is.

        Raises:
            BadImage, ContextOverflow, InvalidRequest, Unsupported: the request cannot be served.
            EngineFailed, OutOfMemory: it could not be served.
        """
        if self._model is None:
            raise EngineFailed("The engine is not running.")
        model = self._model
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        cancelled = threading.Event()

        def emit(delta: Delta | None) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        def work() -> Finished:
            from workers.hf.generation import generate

            try:
                return generate(model, request, images, emit=emit, cancelled=cancelled)
            finally:
                emit(None)

        running = self._in_thread(work)
        self._running[running] = cancelled
        running.add_done_callback(self._ended)
        try:
            while (delta := await deltas.get()) is not None:
                yield delta
            await asyncio.wait([running])
            yield running.result()
        finally:
            cancelled.set()
            with anyio.move_on_after(STOP_S, shield=True):
                await asyncio.wait([running])
            if not running.done():
                log.warning("a closed request still computes after %.0f s", STOP_S)

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        # The context carries the request id into the log entries of the thread.
        return asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, work)

    def _ended(self, running: asyncio.Future[Finished]) -> None:
        from workers.hf.failures import is_fatal

        del self._running[running]
        failure = running.exception()
        if failure is not None and is_fatal(failure.__cause__):
            self._dead.set()

    async def failed(self) -> None:
        """Wait for the death of the accelerator; other failures are a request's own.

        Raises:
            EngineFailed: no request can be served any more.
        """
        await self._dead.wait()
        raise EngineFailed("The accelerator's context is lost.", remedy="Start the worker again.")

    def cache(self) -> CacheStatus | None:
        return None

    async def aclose(self) -> None:
        """Cancel what runs, wait for it and free the model."""
        for cancelled in self._running.values():
            cancelled.set()
        if self._running:
            await asyncio.wait(list(self._running), timeout=STOP_S)
        if self._model is not None:
            self._model = None
            await asyncio.wait([self._in_thread(_free_memory)], timeout=STOP_S)
        self._threads.shutdown(wait=False)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
