"""The Hugging Face engine: its threads, bridged to the event loop.

This module imports neither torch nor transformers; ``start`` does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio

from protocol.errors import (
    AdapterNotFound,
    EngineFailed,
    InvalidRequest,
    TandemError,
    Unsupported,
)
from protocol.events import Delta, Finished
from protocol.messages import BASE, CacheStatus, Capabilities, ChatMessage, GenerateRequest
from workers.engine import EngineInfo, EngineLoad, Progress
from workers.hf.settings import BATCHED_CAPACITY, THREADS_CAPACITY, HfSettings
from workers.images import Picture
from workers.prompts import count_tokens, write

if TYPE_CHECKING:
    from workers.hf.job import Job
    from workers.hf.model import HfModel
    from workers.hf.scheduler import Item, Scheduler
    from workers.hf.threads import Threads

log = logging.getLogger(__name__)

STOP_S = 10.0
"""How long a closed request may take to leave; one layer of the network as a rule."""

ENCODERS = 2
"""Threads that turn requests into tensors: pictures cost most, and the network needs cores too."""

T = TypeVar("T")


class HfEngine:
    """Serves one transformers model; requests decode together where the model allows it."""

    kind = "hf"

    def __init__(self, settings: HfSettings) -> None:
        self._settings = settings
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoding")
        self._model: HfModel | None = None
        self._image_tokens = 0
        self._runner: Scheduler | Threads | None = None
        self._streams: dict[Job, asyncio.Queue[Item]] = {}
        self._leaving: set[str] = set()  # adapters that finish what runs
        self._quiet = asyncio.Condition()  # notified when a stream has ended
        self._dead = asyncio.Event()
        self._closed = False

    async def start(self, progress: Progress) -> EngineInfo:
        """Load the model and generate once.

        Raises:
            EngineFailed: the model cannot be loaded or does not generate.
        """
        loop = asyncio.get_running_loop()

        def report(words: str) -> None:
            if self._closed:
                raise EngineFailed("The worker was stopped while it loaded.")
            loop.call_soon_threadsafe(progress, words)

        def deliver(items: Sequence[tuple[Job, Item]]) -> None:
            loop.call_soon_threadsafe(self._deliver, items)

        progress("importing torch and transformers")
        return await self._in_thread(lambda: self._start(report, deliver))

    def _start(
        self, progress: Progress, deliver: Callable[[Sequence[tuple[Job, Item]]], None]
    ) -> EngineInfo:
        import torch
        import transformers

        from workers.hf import loading, machine, quantization
        from workers.hf.batch import Batch
        from workers.hf.scheduler import Scheduler
        from workers.hf.threads import Threads
        from workers.hf.warmup import warm_up

        model = loading.load(self._settings, progress)
        progress("warming up")
        warm = warm_up(model, batching=self._settings.batching == "auto")
        quantization.release()
        batched = warm.unbatched is None
        if not batched:
            log.warning("requests decode in threads of their own: %s", warm.unbatched)
        capacity = self._settings.limit_model_concurrency or (
            BATCHED_CAPACITY if batched else THREADS_CAPACITY
        )
        if batched:
            batch = Batch(
                model,
                chunk_tokens=machine.chunk_tokens(model.device),
                limit_bytes=machine.spare_bytes(model.device),
            )
            self._runner = Scheduler(batch, prefill_tokens=warm.prefill_tokens, deliver=deliver)
        else:
            self._runner = Threads(capacity, deliver=deliver)
        self._model = model
        self._image_tokens = warm.image_tokens
        return EngineInfo(
            capacity=capacity,
            context_length=model.context_length,
            capabilities=Capabilities(
                chat=model.apply_template is not None,
                images=model.image_token is not None,
                adapters=True,
                grammar=True,
                logprobs=True,
                seed=True,
                resume=True,
            ),
            precision=model.precision,
            weight_bytes=quantization.weight_bytes(model.network),
            unquantized_bytes=quantization.weight_bytes_before(model.network)
            if self._settings.load_4bit or self._settings.load_8bit
            else None,
            device=str(model.device),
            image_tokens=warm.image_tokens,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )

    async def generate(
        self, request: GenerateRequest, images: Sequence[Picture]
    ) -> AsyncGenerator[Delta | Finished]:
        """Yield ``Delta* Finished``, a delta for each token.

        Closing the generator stops the computation and waits for that, so that a slot is free
        only when its computation has ended.

        Raises:
            AdapterNotFound: no such adapter is loaded.
            BadImage, ContextOverflow, InvalidRequest, Unsupported: the request cannot be served.
            EngineFailed, OutOfMemory: it could not be served.
        """
        model, runner = self._running()
        cancelled = threading.Event()
        try:
            job = await self._prepare(model, request, images, cancelled)
        except BaseException:
            cancelled.set()
            raise
        self._check_adapter(request.adapter)  # it may have begun to leave since the shell asked
        items: asyncio.Queue[Item] = asyncio.Queue()
        self._streams[job] = items
        item: Item = Delta(text="")
        try:
            if job.answer.reason is not None:  # resumed at its very end
                item = job.finished()
                yield item
                return
            runner.submit(job)
            while isinstance(item := await items.get(), Delta):
                yield item
            if isinstance(item, TandemError):
                raise item
            if item is None:  # cancelled by aclose
                raise EngineFailed("The worker stopped before the answer was complete.")
            yield item
        finally:
            if isinstance(item, Delta):
                cancelled.set()
                runner.wake()
                with anyio.move_on_after(STOP_S, shield=True) as stopping:
                    while isinstance(await items.get(), Delta):
                        pass
                if stopping.cancelled_caught:
                    log.warning("a closed request still computes after %.0f s", STOP_S)
            del self._streams[job]
            if self._leaving:
                with anyio.CancelScope(shield=True):
                    async with self._quiet:
                        self._quiet.notify_all()

    async def count_tokens(self, text: str) -> int:
        model, _ = self._running()
        count = partial(count_tokens, tokenizer=model.tokenizer, image_tokens=self._image_tokens)
        return await self._in_thread(lambda: count(text))

    async def write(self, turns: Sequence[ChatMessage]) -> str:
        model, _ = self._running()
        apply = partial(
            write,
            tokenizer=model.tokenizer,
            image_token=model.image_token,
            apply_template=model.apply_template,
        )
        return await self._in_thread(lambda: apply(turns))

    async def _prepare(
        self,
        model: HfModel,
        request: GenerateRequest,
        images: Sequence[Picture],
        cancelled: threading.Event,
    ) -> Job:
        """Encode in a thread; one that is abandoned ends at its next stage."""
        from workers.hf.job import prepare

        return await self._in_thread(lambda: prepare(model, request, images, cancelled))

    def _deliver(self, items: Sequence[tuple[Job, Item]]) -> None:
        from workers.hf.failures import is_fatal

        for job, item in items:
            stream = self._streams.get(job)  # gone when its end came after STOP_S
            if stream is not None:
                stream.put_nowait(item)
            if isinstance(item, TandemError) and is_fatal(item.__cause__):
                self._dead.set()

    def _running(self) -> tuple[HfModel, Scheduler | Threads]:
        if self._model is None or self._runner is None:
            raise EngineFailed("The engine is not running.")
        return self._model, self._runner

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        # The context carries the request id into the log entries of the thread.
        return asyncio.get_running_loop().run_in_executor(self._encoders, copy_context().run, work)

    # ---- adapters

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.adapters():
            raise AdapterNotFound(f"No adapter {name!r} is loaded.")

    def adapters(self) -> tuple[str, ...]:
        """Those a request may choose now."""
        if self._model is None:
            return ()
        return tuple(name for name in self._model.adapter_names if name not in self._leaving)

    async def load_adapter(self, name: str, path: str) -> None:
        """Read a LoRA adapter, and attach it between two decode steps.

        Raises:
            InvalidRequest: the name is taken, or what is at ``path`` is no adapter of this model.
            EngineFailed: there is no memory for it.
        """
        from workers.hf.failures import is_out_of_memory

        model, runner = self._running()
        try:
            changes = await asyncio.to_thread(model.adapters.read, path)
        except EngineFailed as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise
            raise InvalidRequest(error.message, remedy=error.remedy) from error
        await asyncio.wrap_future(runner.between(lambda: model.adapters.attach(name, changes)))

    async def unload_adapter(self, name: str) -> None:
        """Let the answers that use it end, then free it.

        Raises:
            AdapterNotFound: it is not loaded.
            InvalidRequest: it is a part of the model.
        """
        model, runner = self._running()
        self._check_adapter(name)
        if name in (BASE, model.default_adapter):
            raise InvalidRequest(f"The adapter {name!r} belongs to the model; it stays.")
        self._leaving.add(name)
        try:
            async with self._quiet:
                await self._quiet.wait_for(
                    lambda: all(job.adapter != name for job in self._streams)
                )
            await asyncio.wrap_future(runner.between(lambda: model.adapters.unload(name)))
        finally:
            self._leaving.discard(name)

    # ---- the end

    async def failed(self) -> None:
        """Wait for the death of the accelerator; other failures are a request's own.

        Raises:
            EngineFailed: no request can be served any more.
        """
        await self._dead.wait()
        raise EngineFailed("The accelerator's context is lost.", remedy="Start the worker again.")

    def load(self) -> EngineLoad:
        return EngineLoad()

    def cache(self) -> CacheStatus | None:
        return None

    async def flush_cache(self) -> None:
        raise Unsupported("The hf worker keeps no prefixes: there is no cache to flush.")

    async def aclose(self) -> None:
        """Cancel what runs, wait for it and free the model."""
        self._closed = True
        for job in self._streams:
            job.cancelled.set()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
            await asyncio.to_thread(runner.join, STOP_S)
            del runner
        if self._model is not None:
            from workers.hf.quantization import release

            self._model = None
            await asyncio.to_thread(release)
        self._encoders.shutdown(wait=False)
