"""The SGLang engine: prompts are tokenized here, tokens come from the server, text is made here.

Text is decoded by the code that the other kinds use, so that equal tokens give equal text. This
module imports neither torch, transformers nor SGLang.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from importlib import metadata
from typing import Any

import anyio

from protocol.errors import (
    ContextOverflow,
    DeadlineExceeded,
    EngineFailed,
    TandemError,
    Unsupported,
    UpstreamLost,
)
from protocol.events import Delta, Finished
from protocol.messages import CacheStatus, Capabilities, GenerateRequest
from transport.process import free_port
from workers.answer import Answer, Reason
from workers.engine import EngineInfo, Progress
from workers.images import Picture
from workers.sglang import command
from workers.sglang.checkpoint import Checkpoint, load
from workers.sglang.client import AnswerTooLong, Chunk, SglangClient
from workers.sglang.figures import CacheCount
from workers.sglang.process import ServerProcess, TemporaryDirectory
from workers.sglang.request import body_of, check
from workers.sglang.settings import SglangSettings
from workers.text import TextStream

log = logging.getLogger(__name__)

TESTED_VERSION = "0.5.23"
READY_POLL_S = 0.1
WATCH_S = 0.5
LOST_AFTER = 2
"""Looks in a row at which a server we did not start must be gone."""

ABORT_AGAIN_AFTER_S = (0.01, 0.02, 0.03)


class SglangEngine:
    """Serves one model through an SGLang server: a child of ours, or a running one."""

    kind = "sglang"

    def __init__(self, settings: SglangSettings) -> None:
        self._settings = settings
        self._client: SglangClient | None = None
        self._process: ServerProcess | None = None
        self._checkpoint: Checkpoint | None = None
        self._input_limit = 0  # tokens of prompt and resumed answer
        self._seeded = False
        self._cache: CacheCount | None = None
        self._running = 0
        self._last_step_s = 0.0
        self._failure: asyncio.Future[TandemError] | None = None
        self._watcher: asyncio.Task[None] | None = None

    # ---- life

    async def start(self, progress: Progress) -> EngineInfo:
        """Start the server, or find it, and load the tokenizer meanwhile.

        Raises:
            EngineFailed: the model cannot be served; the message says what to do.
            OutOfMemory: it does not fit.
        """
        self._failure = asyncio.get_running_loop().create_future()
        loading = asyncio.create_task(
            asyncio.to_thread(
                load,
                self._settings.model_path,
                trust_remote_code=self._settings.trust_remote_code,
            )
        )
        try:
            device = await self._reach_server(progress, loading)
            self._checkpoint = await loading
        finally:
            loading.cancel()
        assert self._client is not None
        server, model = await self._client.describe()
        self._check_model(model)
        self._watcher = asyncio.create_task(self._watch())
        return self._describe(self._checkpoint, server, model, device)

    async def _reach_server(
        self, progress: Progress, loading: asyncio.Task[Checkpoint]
    ) -> str | None:
        """Return when the server is ready, with the device if it is known."""
        if self._settings.sgl_endpoint is not None:
            self._client = self._new_client(self._settings.sgl_endpoint)
            progress("looking for the SGLang server")
            if not await self._client.ready():
                raise EngineFailed(
                    f"No SGLang server is ready at {self._settings.sgl_endpoint}.",
                    remedy="Start it, or leave --sgl-endpoint out to have one started.",
                )
            return None
        _check_version()
        progress("starting the SGLang server")
        device = await asyncio.to_thread(command.pick_device, self._settings.device)
        dtype: str = self._settings.dtype
        if device == "cpu":
            dtype = command.cpu_dtype(dtype, command.cpu_flags())
        directory = await asyncio.to_thread(TemporaryDirectory)
        self._process = ServerProcess(directory)
        port = free_port()
        self._client = self._new_client(f"http://127.0.0.1:{port}")
        await self._process.start(
            command.server_args(self._settings, device=device, dtype=dtype, port=port),
            command.server_environment(
                os.environ, device=device, temporary=directory.path, parent_pid=os.getpid()
            ),
            progress,
        )
        await self._until_ready(self._process, self._client, loading)
        return "cpu" if device == "cpu" else "cuda:0"

    async def _until_ready(
        self, process: ServerProcess, client: SglangClient, loading: asyncio.Task[Checkpoint]
    ) -> None:
        deadline_s = time.monotonic() + self._settings.start_timeout_s
        while not await client.ready():
            if not process.running:
                await process.wait()
                raise process.failure()
            if loading.done():
                loading.result()  # a checkpoint without a tokenizer need not be waited for
            if time.monotonic() > deadline_s:
                raise EngineFailed(
                    f"The SGLang server is not ready after {self._settings.start_timeout_s:.0f} s.",
                    remedy="Raise --start-timeout-s, or see what it does with --log-level DEBUG.",
                )
            await asyncio.sleep(READY_POLL_S)
        await process.ready()

    def _new_client(self, base_url: str) -> SglangClient:
        return SglangClient(base_url, silence_s=self._settings.hang_timeout_s)

    def _check_model(self, model: dict[str, Any]) -> None:
        if not model.get("is_generation", True):
            raise EngineFailed(f"{model['model_path']} does not generate text.")
        attached = self._settings.sgl_endpoint is not None
        if attached and model["model_path"] != self._settings.model_path:
            if "model_path" not in self._settings.model_fields_set:
                raise EngineFailed(
                    f"{self._settings.sgl_endpoint} serves {model['model_path']}.",
                    remedy=f"Say so: --model-path {model['model_path']}",
                )
            log.info("the endpoint calls its model %s", model["model_path"])

    def _describe(
        self,
        checkpoint: Checkpoint,
        server: dict[str, Any],
        model: dict[str, Any],
        device: str | None,
    ) -> EngineInfo:
        """What was started; notes what ``generate`` needs of it."""
        self._input_limit = server["max_req_input_len"]
        self._seeded = bool(server.get("enable_deterministic_inference"))
        if not server.get("disable_radix_cache"):
            self._cache = CacheCount(server["max_total_num_tokens"])
        precision = server.get("quantization") or server["dtype"]
        return EngineInfo(
            capacity=server["capacity"],
            # SGLang keeps 6 tokens of the context from a prompt and 2 from an answer.
            context_length=self._input_limit + 4,
            capabilities=Capabilities(
                chat=checkpoint.apply_template is not None,
                images=checkpoint.image_token is not None
                and bool(model.get("has_image_understanding")),
                seed=self._seeded,
                resume=True,
            ),
            precision=checkpoint.precision if precision == "auto" else precision,
            device=device or str(server.get("device")),
            image_tokens=checkpoint.image_tokens,
            versions={"sglang": str(server.get("version"))},
        )

    async def failed(self) -> None:
        """Wait for the death of the server, or for it to hang.

        Raises:
            EngineFailed, OutOfMemory: it has died.
        """
        assert self._failure is not None
        raise await asyncio.shield(self._failure)

    async def _watch(self) -> None:
        """Notice the server's end: by its process, or by its silence."""
        assert self._failure is not None
        process = self._process
        ended = None if process is None else asyncio.create_task(process.wait())
        lost = 0
        try:
            while not self._failure.done():
                if ended is None:
                    await asyncio.sleep(WATCH_S)
                    lost = lost + 1 if not await self._answers() else 0
                else:
                    await asyncio.wait([ended], timeout=WATCH_S)
                    if ended.done() and process is not None:
                        self._failure.set_result(process.failure())
                        return
                if lost >= LOST_AFTER:
                    self._failure.set_result(
                        EngineFailed(f"{self._settings.sgl_endpoint} does not answer any more.")
                    )
                elif self._silent_s() > self._settings.hang_timeout_s:
                    self._failure.set_result(self._hung())
        finally:
            if ended is not None:
                ended.cancel()

    async def _answers(self) -> bool:
        assert self._client is not None
        return await self._client.ready()

    def _silent_s(self) -> float:
        return time.monotonic() - self._last_step_s if self._running else 0.0

    def _hung(self) -> EngineFailed:
        return EngineFailed(
            f"The SGLang server has produced nothing for {self._settings.hang_timeout_s:.0f} s.",
            remedy="If it only is slow, raise --hang-timeout-s.",
        )

    def cache(self) -> CacheStatus | None:
        return None if self._cache is None else self._cache.status()

    def adapters(self) -> tuple[str, ...]:
        return ()

    async def load_adapter(self, name: str, path: str) -> None:
        raise Unsupported("The sglang worker does not take adapters.")

    async def unload_adapter(self, name: str) -> None:
        raise Unsupported("The sglang worker does not take adapters.")

    async def aclose(self) -> None:
        """Stop the server if it is ours; harmless when repeated or when ``start`` failed."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
            self._watcher = None
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        if self._process is not None:
            await self._process.stop()
            self._process = None

    # ---- one request

    async def generate(
        self, request: GenerateRequest, images: Sequence[Picture]
    ) -> AsyncGenerator[Delta | Finished]:
        """Yield ``Delta* Finished``; closing the generator aborts the request in the server.

        Raises:
            BadImage, ContextOverflow, InvalidRequest, Unsupported: the request cannot be served.
            Overloaded: the server's own queue is full.
            EngineFailed, OutOfMemory: it could not be served.
        """
        client, checkpoint = self._client, self._checkpoint
        if client is None or checkpoint is None:
            raise EngineFailed("The engine is not running.")
        check(request)
        ids = await asyncio.to_thread(checkpoint.encode, request)
        prompt_tokens = len(ids) - len(request.resume_token_ids)
        answer = Answer(
            TextStream(checkpoint.decode, request.stop),
            eos_ids=checkpoint.eos_ids,
            max_tokens=min(request.max_new_tokens, self._input_limit + 4 - prompt_tokens),
        )
        answer.resume(request.resume_token_ids)
        if answer.reason is not None:  # resumed after its end
            prompt_tokens += len(images) * (checkpoint.image_tokens - 1)
            yield _finished(answer, answer.reason, prompt_tokens, cached_tokens=0)
            return
        if len(ids) >= self._input_limit:
            raise ContextOverflow(
                f"The prompt has {len(ids)} tokens; this worker takes fewer than "
                f"{self._input_limit}."
            )
        body = await asyncio.to_thread(
            body_of, request, ids, images, max_new_tokens=answer.tokens_left, seeded=self._seeded
        )
        async with aclosing(self._chunks(client, body)) as chunks:
            async for chunk in chunks:
                delta = _push(answer, chunk)
                if delta.token_ids:
                    yield delta
                if answer.reason is not None:
                    break
        if answer.reason is None:
            raise EngineFailed("The SGLang server ended an answer without saying why.")
        resumed = len(request.resume_token_ids)
        prompt_tokens = chunk.prompt_tokens - resumed
        cached_tokens = min(chunk.cached_tokens, prompt_tokens)
        if self._cache is not None:
            self._cache.count(chunk, answer.tokens - resumed)
        yield _finished(answer, answer.reason, prompt_tokens, cached_tokens=cached_tokens)

    async def _chunks(self, client: SglangClient, body: dict[str, Any]) -> AsyncGenerator[Chunk]:
        """The answer in chunks; sent once more without a limit if only the limit is too large."""
        try:
            async with aclosing(self._attempt(client, body)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        except AnswerTooLong:
            # The images take part of the context, and only the server knows how much.
            sampling = body["sampling_params"] | {"max_new_tokens": None}
        async with aclosing(self._attempt(client, body | {"sampling_params": sampling})) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _attempt(self, client: SglangClient, body: dict[str, Any]) -> AsyncGenerator[Chunk]:
        """One request to the server, under an id of its own; aborted if it does not end."""
        rid = uuid.uuid4().hex
        ended = begun = False
        if not self._running:
            self._last_step_s = time.monotonic()
        self._running += 1
        try:
            async with aclosing(client.generate(body | {"rid": rid})) as chunks:
                async for chunk in chunks:
                    self._last_step_s = time.monotonic()
                    begun = True
                    ended = chunk.reason is not None
                    yield chunk
        except DeadlineExceeded as exc:
            raise self._hung() from exc
        except UpstreamLost as exc:
            ended = True
            raise await self._lost(exc) from exc
        except (AnswerTooLong, TandemError):
            ended = True
            raise
        finally:
            self._running -= 1
            if not ended:
                # An id the server has not read yet cannot be aborted, so it may take several.
                with anyio.move_on_after(1, shield=True), suppress(TandemError):
                    await client.abort(rid)
                    for pause_s in () if begun else ABORT_AGAIN_AFTER_S:
                        await asyncio.sleep(pause_s)
                        await client.abort(rid)

    async def _lost(self, exc: UpstreamLost) -> TandemError:
        """Why the connection is gone: the server's own reason if it has died."""
        assert self._failure is not None
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._failure), 1.0)
        return EngineFailed(f"The SGLang server is lost: {exc.message}")


def _push(answer: Answer, chunk: Chunk) -> Delta:
    """What of ``chunk`` belongs to ``answer``: nothing after its end."""
    text = ""
    taken = 0
    for token_id in chunk.token_ids:
        if answer.reason is not None:
            break
        text += answer.push(token_id)
        taken += 1
    if answer.reason is None and chunk.reason is not None:
        text += answer.end("length" if chunk.reason == "length" else "stop")
    return Delta(text=text, token_ids=chunk.token_ids[:taken])


def _finished(
    answer: Answer, reason: Reason, prompt_tokens: int, *, cached_tokens: int
) -> Finished:
    return Finished(
        reason=reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=answer.tokens,
        cached_tokens=cached_tokens,
    )


def _check_version() -> None:
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError as exc:
        raise EngineFailed(
            "SGLang is not installed.",
            remedy="Install Tandem's extra sglang, or use --sgl-endpoint or the HF worker.",
        ) from exc
    if version.split(".")[:2] != TESTED_VERSION.split(".")[:2]:
        log.warning("SGLang %s is installed; Tandem is tested with %s", version, TESTED_VERSION)
