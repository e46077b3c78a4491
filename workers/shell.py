"""The shell: admission, slots and status around any engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial

from anyio import CapacityLimiter, WouldBlock, move_on_after, to_thread

from protocol.errors import (
    AdapterNotFound,
    Draining,
    EngineFailed,
    ModelNotFound,
    NoReplicaAvailable,
    Overloaded,
    TandemError,
    Unsupported,
)
from protocol.events import (
    Delta,
    Event,
    Failed,
    Finished,
    is_terminal,
)
from protocol.messages import (
    IMAGE_PLACEHOLDER,
    PROTOCOL_VERSION,
    AdapterSource,
    Capabilities,
    GenerateRequest,
    WorkerState,
    WorkerStatus,
    one_adapter,
    split_model,
)
from transport.tracing import Headers, Tracer
from workers import images
from workers.engine import Engine, EngineInfo
from workers.fastchat import FastChat
from workers.metrics import Account, Metrics
from workers.settings import WorkerSettings
from workers.speed import SpeedMeter

log = logging.getLogger(__name__)

_OUTSIDE_CAPABILITIES = {
    "chat": "messages",
    "grammar": "json_schema or regex",
    "images": "images",
    "resume": "resume_token_ids",
}
"""Capabilities whose request field has another name."""


class Shell:
    """One engine behind the worker's routes.

    ``state`` moves starting -> ready <-> draining; only a ready worker takes requests.
    """

    def __init__(
        self,
        engine: Engine,
        kind: str,
        worker_id: str,
        settings: WorkerSettings,
        on_change: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._on_change = on_change  # called when the state has changed
        self._kind = kind
        self.worker_id = worker_id
        self.max_body_bytes = settings.max_body_bytes
        self._epoch = time.time_ns()
        self._info: EngineInfo | None = None
        self._slots = CapacityLimiter(1)
        self._speed = SpeedMeter(time.monotonic)
        self._leaving = False
        self._failure: TandemError | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.state = WorkerState.STARTING
        self.progress = "starting"
        self.metrics = Metrics(self.status)
        self.fastchat = FastChat(engine, settings.name, self._check_running)
        self.tracer: Tracer | None = None  # set before the first request, if traces are wanted

    # ---- life

    def start(self, info: EngineInfo) -> None:
        """The engine is loaded; ``ready`` opens the door."""
        self._info = info
        self._slots.total_tokens = self._settings.limit_model_concurrency or info.capacity

    def ready(self) -> None:
        self._enter(WorkerState.READY)

    def drain(self) -> None:
        """Finish what runs, accept nothing (law L6); only a ready worker can."""
        if self.state is WorkerState.READY:
            self._enter(WorkerState.DRAINING)

    def resume(self) -> None:
        """Accept requests again, unless the process is about to end."""
        if self.state is WorkerState.DRAINING and not self._leaving:
            self.ready()

    def leave(self, failure: TandemError | None = None) -> None:
        """Drain for good, because the process ends; ``failure`` is why its engine died."""
        self._leaving = True
        self._failure = failure
        self._enter(WorkerState.DRAINING)

    async def idle(self) -> None:
        """Return when nothing runs."""
        await self._idle.wait()

    def _enter(self, state: WorkerState) -> None:
        self.state = state
        self._on_change()
        log.info("state", extra={"worker_id": self.worker_id, "state": state.value})

    def status(self) -> WorkerStatus:
        slots = self._slots.statistics()
        info = self._info
        load = self._engine.load()
        running = slots.borrowed_tokens + load.others_running
        waiting = slots.tasks_waiting + load.others_waiting
        name, adapters = self._settings.name, self._engine.adapters() if info else ()
        return WorkerStatus(
            model_names=(name, *(f"{name}:{adapter}" for adapter in adapters)),
            speed=round(load.tokens_per_s or self._speed.tokens_per_s, 2),
            queue_length=running + waiting,
            worker_id=self.worker_id,
            epoch=self._epoch,
            kind=self._kind,
            state=self.state,
            capacity=int(slots.total_tokens),
            running=running,
            waiting=waiting,
            context_length=info.context_length if info else None,
            image_tokens=info.image_tokens if info else 0,
            capabilities=info.capabilities if info else Capabilities(chat=True),
            precision=info.precision if info else None,
            weight_bytes=info.weight_bytes if info else None,
            unquantized_bytes=info.unquantized_bytes if info else None,
            device=info.device if info else None,
            adapters=adapters,
            cache=self._engine.cache() if info else None,
            versions=info.versions if info else {},
            progress=self.progress if self.state is WorkerState.STARTING else None,
            protocol_version=PROTOCOL_VERSION,
        )

    # ---- adapters

    def adapters(self) -> tuple[str, ...]:
        """Those that requests can choose now."""
        return self._engine.adapters()

    async def load_adapter(self, source: AdapterSource) -> None:
        """Load an adapter and tell the controllers.

        Raises:
            InvalidRequest, Unsupported: the engine does not take it.
            EngineFailed, NoReplicaAvailable: it cannot be loaded, or not yet.
        """
        self._check_running()
        with _typed():
            await self._engine.load_adapter(source.name, source.path)
        self._on_change()
        log.info("adapter %s loaded", source.name, extra={"worker_id": self.worker_id})

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter and tell the controllers.

        Raises:
            AdapterNotFound: it is not loaded.
            InvalidRequest, Unsupported: the engine does not let it go.
            EngineFailed, NoReplicaAvailable: the engine is not running.
        """
        self._check_running()
        with _typed():
            await self._engine.unload_adapter(name)
        self._on_change()
        log.info("adapter %s unloaded", name, extra={"worker_id": self.worker_id})

    # ---- the cache, and the engine's life

    async def flush_cache(self) -> None:
        """Empty the engine's prefix cache and tell the controllers.

        Raises:
            Overloaded: requests run.
            Unsupported: the engine has none.
            EngineFailed, NoReplicaAvailable: the engine is not running, or could not do it.
        """
        self._check_running()
        with _typed():
            await self._engine.flush_cache()
        self._on_change()
        log.info("cache flushed", extra={"worker_id": self.worker_id})

    @property
    def token_age_s(self) -> float | None:
        """Time since the engine last made a token, if it says so; an idle one is tried."""
        return self._engine.load().token_age_s

    # ---- one request

    async def warm_up(self) -> None:
        """A short generation: the first request finds everything warm, and ``speed`` a value.

        A model that sees is shown a picture, so that what breaks on pictures breaks here.
        """
        sees = self._info is not None and self._info.capabilities.images
        picture = images.Picture.blank().data_uri()
        request = GenerateRequest(
            model=self._settings.name,
            prompt=f"{IMAGE_PLACEHOLDER if sees else ''}\nCount to 100.",
            images=(picture,) if sees else (),
            temperature=0,
            max_new_tokens=24,
        )
        async with aclosing(self._run(request, Account())) as events:
            async for _ in events:
                pass

    async def generate(
        self, request: GenerateRequest, headers: Headers = ()
    ) -> AsyncGenerator[Event]:
        """The event stream of ``request``; refusals are raised before its first event.

        ``headers``, those it came with, are looked at only for the context of a trace.

        Raises:
            TandemError: before the first event only; after it the error is a ``Failed`` event.
        """
        account = Account()
        if self.tracer is not None:
            account.trace = self.tracer.begin(headers, account.begun_at)
        try:
            request = self._addressed(request)
            self._check(request)
            request = await self.fastchat.own(request)
            async with aclosing(self._run(request, account)) as events:
                async for event in events:
                    if account.first_at is None:
                        account.first_at = time.monotonic()
                    if isinstance(event, Delta):
                        account.tokens += len(event.token_ids)
                    else:
                        account.finished = event
                    yield event
        except TandemError as error:
            account.fail(error.code)
            if account.first_at is None:
                raise
            yield Failed.of(error)
        finally:
            account.close(self.metrics, request, self.worker_id)

    def _addressed(self, request: GenerateRequest) -> GenerateRequest:
        """``request`` with an adapter in its model name moved to the field for it."""
        base, named = split_model(request.model)
        if named is None or base != self._settings.name:
            return request
        adapter = one_adapter(named, request.adapter)
        return request.model_copy(update={"model": base, "adapter": adapter})

    def _check_running(self) -> EngineInfo:
        if self._failure is not None:
            raise EngineFailed(self._failure.message, remedy=self._failure.remedy)
        if self.state is WorkerState.STARTING or self._info is None:
            raise NoReplicaAvailable(
                f"This worker is not ready yet: {self.progress}.", retry_after_s=5
            )
        return self._info

    def _check(self, request: GenerateRequest) -> None:
        """Whether this worker takes this request now; the controller may be out of date."""
        if self.state is WorkerState.DRAINING and self._failure is None:
            raise Draining("This worker finishes what runs and accepts nothing new.")
        info = self._check_running()
        if request.model != self._settings.name:
            raise ModelNotFound(
                f"This worker serves {self._settings.name!r}, not {request.model!r}."
            )
        if request.adapter is not None and request.adapter not in self._engine.adapters():
            raise AdapterNotFound(f"This worker has no adapter {request.adapter!r} loaded.")
        for need in info.capabilities.missing(request.needs):
            raise Unsupported(
                f"The {self._kind} worker on {info.device} does not support "
                f"{_OUTSIDE_CAPABILITIES.get(need, need)}."
            )

    async def _run(
        self, request: GenerateRequest, account: Account
    ) -> AsyncGenerator[Delta | Finished]:
        """Exactly one terminal event, in a slot that this function takes and gives back (L1)."""
        account.queued_at = time.monotonic()
        async with self._slot():
            account.slot_at = time.monotonic()
            pictures = await self._decoded(request.images)
            account.ready_at = time.monotonic()
            with _typed():
                async with aclosing(self._engine.generate(request, pictures)) as events:
                    async for event in events:
                        if isinstance(event, Delta):
                            self._speed.count(len(event.token_ids))
                        yield event
                        if is_terminal(event):
                            return
            raise EngineFailed("The engine ended without saying that it had finished.")

    async def _decoded(self, encoded: Sequence[str]) -> list[images.Picture]:
        """The pictures; one who leaves does not wait for them, and their thread soon ends, too."""
        if not encoded:
            return []
        left = threading.Event()
        decode = partial(images.decode, max_pixels=self._settings.max_image_pixels, cancelled=left)
        try:
            return await to_thread.run_sync(decode, encoded, abandon_on_cancel=True)
        finally:
            left.set()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """One of ``capacity`` slots, after a bounded wait in arrival order."""
        borrower = object()
        try:
            self._slots.acquire_on_behalf_of_nowait(borrower)
        except WouldBlock:
            await self._wait_for_slot(borrower)
        self._idle.clear()
        self._speed.begin()
        try:
            if self.state is WorkerState.DRAINING:
                raise Draining("This worker began to drain while the request waited.")
            yield
        finally:
            self._speed.end()
            self._slots.release_on_behalf_of(borrower)
            if not self._slots.borrowed_tokens:
                self._idle.set()

    async def _wait_for_slot(self, borrower: object) -> None:
        waiting = self._slots.statistics().tasks_waiting
        if waiting >= self._settings.max_waiting:
            raise Overloaded(f"{waiting} requests wait already at this worker.", retry_after_s=1)
        with move_on_after(self._settings.max_wait_s) as scope:
            await self._slots.acquire_on_behalf_of(borrower)
        if scope.cancelled_caught:
            raise Overloaded(
                f"No slot became free within {self._settings.max_wait_s:g} s.", retry_after_s=1
            )


@contextmanager
def _typed() -> Iterator[None]:
    """What an engine raises, as an error of the protocol."""
    try:
        yield
    except TandemError:
        raise
    except Exception as exc:
        log.exception("the engine raised something it should not")
        raise EngineFailed(f"The engine failed: {type(exc).__name__}.") from exc
