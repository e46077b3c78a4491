"""The SGLang engine: prompts are tokenized here, tokens come from the server, text is made here.

Text is decoded by the code that the other kinds use, so that equal tokens give equal text. This
module imports neither torch, transformers nor SGLang.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from protocol.errors import (
    ContextOverflow,
    DeadlineExceeded,
    EngineFailed,
    Unsupported,
    UpstreamLost,
)
from protocol.events import Delta, Finished
from protocol.messages import CacheStatus, Capabilities, ChatMessage, GenerateRequest
from transport.process import free_port
from workers.answer import Answer, Reason
from workers.engine import EngineInfo, EngineLoad, Progress
from workers.images import Picture
from workers.sglang import command
from workers.sglang.adapters import Adapters, largest_rank
from workers.sglang.checkpoint import Checkpoint, is_original, load
from workers.sglang.client import SglangClient
from workers.sglang.figures import CacheCount
from workers.sglang.process import ServerProcess, TemporaryDirectory
from workers.sglang.request import GRAMMAR_BACKEND, body_of, check
from workers.sglang.server import version
from workers.sglang.settings import SglangSettings
from workers.sglang.stream import push, stream
from workers.sglang.watch import Watch
from workers.text import TextStream

log = logging.getLogger(__name__)

READY_POLL_S = 0.1
SILENCE_S = 300.0
"""How long one answer may be without news of a server that takes steps: a long prompt may take
minutes."""


class SglangEngine:
    """Serves one model through an SGLang server: a child of ours, or a running one."""

    kind = "sglang"

    def __init__(self, settings: SglangSettings) -> None:
        self._settings = settings
        self._client: SglangClient | None = None
        self._process: ServerProcess | None = None
        self._checkpoint: Checkpoint | None = None
        self._directory = TemporaryDirectory()
        self._adapters = Adapters(settings, self._directory)
        self._input_limit = 0  # tokens of prompt and resumed answer
        self._seeded = False
        self._ours = False  # the server was started by a worker, this or another
        self._cache: CacheCount | None = None
        self._watch: Watch | None = None

    # ---- life

    async def start(self, progress: Progress) -> EngineInfo:
        """Start the server, or find it, and load the tokenizer meanwhile.

        Raises:
            EngineFailed: the model cannot be served; the message says what to do.
            OutOfMemory: it does not fit.
        """
        loading = asyncio.create_task(self._load())
        try:
            device = await self._reach_server(progress, loading)
            self._checkpoint = await loading
        finally:
            loading.cancel()
        assert self._client is not None
        server, model = await self._client.describe()
        if self._process is None and (doubt := version.doubt(str(server["version"]))):
            log.warning(doubt)
        self._check_model(model, self._checkpoint)
        await self._adapters.open(self._client, server)
        await self._start_watch(self._client)
        return self._describe(self._checkpoint, server, model, device)

    async def start_part(self, progress: Progress) -> None:
        """Start a server that is one of several machines' and takes no requests.

        Raises:
            EngineFailed: it cannot do its part; the message says what to do.
            OutOfMemory: it does not fit.
        """
        loading = asyncio.create_task(self._load())
        try:
            await self._reach_server(progress, loading)
            await loading
        finally:
            loading.cancel()

    async def part_ended(self) -> None:
        """Wait for the end of a server started by ``start_part``.

        Raises:
            EngineFailed, OutOfMemory: it has ended.
        """
        assert self._process is not None
        await self._process.wait()
        raise self._process.failure()

    async def _load(self) -> Checkpoint:
        """The tokenizer; the adapters are read as well."""
        checkpoint = await asyncio.to_thread(
            load,
            self._settings.model_path,
            trust_remote_code=self._settings.trust_remote_code,
            conv_template=self._settings.conv_template,
            name=self._settings.name,
        )
        original = checkpoint.original
        await asyncio.to_thread(self._adapters.prepare, original and original.config)
        return checkpoint

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
        version.check(version.installed())
        progress("starting the SGLang server")
        device = await asyncio.to_thread(command.pick_device, self._settings.device)
        dtype: str = self._settings.dtype
        if device == "cpu":
            dtype = command.cpu_dtype(dtype, command.cpu_flags())
        adapter_rank = await asyncio.to_thread(largest_rank, self._settings)
        temporary = await asyncio.to_thread(self._directory.make)
        self._process = ServerProcess(self._directory)
        served = await self._served(temporary, loading)
        port = free_port()
        self._client = self._new_client(f"http://127.0.0.1:{port}")
        await self._process.start(
            command.server_args(
                served, device=device, dtype=dtype, port=port, adapter_rank=adapter_rank
            ),
            command.server_environment(
                os.environ, device=device, temporary=temporary, parent_pid=os.getpid()
            ),
            progress,
        )
        free_bytes = None
        if device == "cpu":
            free_bytes = await asyncio.to_thread(command.available_bytes)

        def fits(checkpoint: Checkpoint) -> None:
            tokens = command.cache_tokens(self._settings, device)
            if tokens is not None:
                command.check_cache_fits(checkpoint.cache_values, tokens, dtype, free_bytes)

        await self._until_ready(self._process, self._client, loading, fits)
        return "cpu" if device == "cpu" else "cuda:0"

    async def _served(self, temporary: str, loading: asyncio.Task[Checkpoint]) -> SglangSettings:
        """The settings for the server, which loads a view of a checkpoint in LLaVA's format."""
        if not await asyncio.to_thread(is_original, self._settings.model_path):
            return self._settings
        checkpoint = await asyncio.shield(loading)
        assert checkpoint.original is not None
        view = await asyncio.to_thread(checkpoint.original.write_view, temporary)
        return command.of_view(self._settings, view)

    async def _until_ready(
        self,
        process: ServerProcess,
        client: SglangClient,
        loading: asyncio.Task[Checkpoint],
        fits: Callable[[Checkpoint], None],
    ) -> None:
        deadline_s = time.monotonic() + self._settings.start_timeout_s
        while not await client.ready():
            if not process.running:
                await process.wait()
                raise version.explain(process.failure(), version.installed())
            if loading.done():  # one without a tokenizer or too large need not be waited for
                fits(loading.result())
            if time.monotonic() > deadline_s:
                raise EngineFailed(
                    f"The SGLang server is not ready after {self._settings.start_timeout_s:.0f} s.",
                    remedy="Raise --start-timeout-s, or see what it does with --log-level DEBUG.",
                )
            await asyncio.sleep(READY_POLL_S)
        fits(await asyncio.shield(loading))
        await process.ready()

    def _new_client(self, base_url: str) -> SglangClient:
        silence_s = max(SILENCE_S, self._settings.hang_timeout_s)
        return SglangClient(base_url, silence_s=silence_s)

    def _check_model(self, model: dict[str, Any], checkpoint: Checkpoint) -> None:
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
        served = model.get("architectures") or ()
        if checkpoint.original is not None and command.VIEW_ARCHITECTURE not in served:
            raise EngineFailed(
                f"{self._settings.model_path} is in LLaVA's original format, which another SGLang "
                "server than Tandem's reads in its own way.",
                remedy="Leave --sgl-endpoint out to have one started.",
            )

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
        backend = server.get("grammar_backend")
        self._ours = backend == GRAMMAR_BACKEND
        # Speculative decoding chooses tokens elsewhere, and goes back in grammars.
        speculative = server.get("speculative_algorithm") is not None
        if not server.get("disable_radix_cache"):
            self._cache = CacheCount(server["cache_tokens"])
        precision = server.get("quantization") or server["dtype"]
        return EngineInfo(
            capacity=server["capacity"],
            # SGLang keeps 6 tokens of the context from a prompt and 2 from an answer.
            context_length=self._input_limit + 4,
            capabilities=Capabilities(
                chat=checkpoint.apply_template is not None,
                images=checkpoint.image_token is not None
                and bool(model.get("has_image_understanding")),
                # A grammar must be able to end an answer.
                grammar=(self._ours or backend == "xgrammar")
                and bool(checkpoint.eos_ids)
                and not speculative,
                # SGLang's own are those after penalties and grammar.
                logprobs=self._ours and not speculative,
                seed=self._seeded,
                resume=True,
                adapters=self._adapters.enabled,
            ),
            precision=checkpoint.precision if precision == "auto" else precision,
            device=device or str(server.get("device")),
            image_tokens=checkpoint.image_tokens,
            versions={"sglang": str(server.get("version"))},
        )

    async def _start_watch(self, client: SglangClient) -> None:
        self._watch = Watch(
            client,
            self._process,
            hang_timeout_s=self._settings.hang_timeout_s,
            health_interval_s=self._settings.health_interval_s,
        )
        with suppress(DeadlineExceeded, UpstreamLost):  # which the watch takes up
            await self._watch.look()
        self._watch.start()

    async def count_tokens(self, text: str) -> int:
        return await asyncio.to_thread(self._read().count_tokens, text)

    async def write(self, turns: Sequence[ChatMessage]) -> str:
        return await asyncio.to_thread(self._read().write, turns)

    def _read(self) -> Checkpoint:
        if self._checkpoint is None:
            raise EngineFailed("The engine is not running.")
        return self._checkpoint

    async def failed(self) -> None:
        """Wait for the death of the server, or for it to hang.

        Raises:
            EngineFailed, OutOfMemory: it has died.
        """
        assert self._watch is not None
        await self._watch.failed()

    def load(self) -> EngineLoad:
        """SGLang's own figures, up to half a second and 15 decode steps old."""
        return EngineLoad() if self._watch is None else self._watch.load()

    def cache(self) -> CacheStatus | None:
        if self._cache is None or self._watch is None:
            return None
        return self._cache.status(self._watch.held_tokens if self._ours else None)

    async def flush_cache(self) -> None:
        """Empty the prefix cache.

        Raises:
            Overloaded: requests run.
            Unsupported: the server has none.
            EngineFailed: it could not be done.
        """
        if self._cache is None or self._client is None or self._watch is None:
            raise Unsupported("The SGLang server was started with --disable-radix-cache.")
        await self._client.flush_cache()
        self._cache.flushed()
        await self._watch.until_flushed()

    def adapters(self) -> tuple[str, ...]:
        """Those a request may choose now."""
        return self._adapters.names

    async def load_adapter(self, name: str, path: str) -> None:
        """Have SGLang load a LoRA adapter, between two of its steps.

        Raises:
            InvalidRequest: the name is taken, or what is at ``path`` is no adapter of this model.
            Unsupported: the server was started without room for adapters.
            EngineFailed: SGLang cannot hold it.
        """
        await self._adapters.load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """Let the answers that use it end, then free it.

        Raises:
            AdapterNotFound: it is not loaded.
            Unsupported: the server was started without room for adapters.
            EngineFailed: SGLang does not free it.
        """
        await self._adapters.unload(name)

    async def aclose(self) -> None:
        """Stop the server if it is ours; harmless when repeated or when ``start`` failed."""
        if self._watch is not None:
            await self._watch.aclose()
            self._watch = None
        await self._adapters.aclose()
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        if self._process is not None:
            await self._process.stop()
            self._process = None
        await asyncio.to_thread(self._directory.remove)

    # ---- one request

    async def generate(
        self, request: GenerateRequest, images: Sequence[Picture]
    ) -> AsyncGenerator[Delta | Finished]:
        """Yield ``Delta* Finished``; closing the generator aborts the request in the server.

        Raises:
            AdapterNotFound: no such adapter is loaded.
            BadImage, ContextOverflow, InvalidRequest, Unsupported: the request cannot be served.
            Overloaded: the server's own queue is full.
            EngineFailed, OutOfMemory: it could not be served.
        """
        client, checkpoint, watch = self._client, self._checkpoint, self._watch
        if client is None or checkpoint is None or watch is None:
            raise EngineFailed("The engine is not running.")
        check(request, seeded=self._seeded, ours=self._ours)
        ids = await asyncio.to_thread(checkpoint.encode, request)
        prompt_tokens = len(ids) - len(request.resume_token_ids)
        answer = Answer(
            TextStream(checkpoint.decode, (*request.stop, *checkpoint.stops)),
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
            body_of,
            request,
            ids,
            images,
            max_new_tokens=answer.tokens_left,
            seeded=self._seeded,
            ours=self._ours,
            eos_ids=checkpoint.eos_ids,
            image_token_id=checkpoint.image_token_id,
        )
        with self._adapters.using(request.adapter) as known:
            if known is not None:
                body["lora_path"] = known
            async with aclosing(stream(client, watch, body)) as chunks:
                async for chunk in chunks:
                    delta = push(answer, chunk, checkpoint.spell)
                    if delta.token_ids or delta.text:
                        yield delta
                    if answer.reason is not None:
                        break
        if answer.reason is None:
            raise EngineFailed("The SGLang server ended an answer without saying why.")
        resumed = len(request.resume_token_ids)
        prompt_tokens = chunk.prompt_tokens - resumed
        cached_tokens = min(chunk.cached_tokens, prompt_tokens)
        if self._cache is not None:
            new_tokens = answer.tokens - resumed
            self._cache.count(chunk.prompt_tokens, chunk.cached_tokens, new_tokens)
        yield _finished(answer, answer.reason, prompt_tokens, cached_tokens=cached_tokens)


def _finished(
    answer: Answer, reason: Reason, prompt_tokens: int, *, cached_tokens: int
) -> Finished:
    return Finished(
        reason=reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=answer.tokens,
        cached_tokens=cached_tokens,
    )
