"""SGLang's HTTP interface: one stream of tokens, an abort, and what the server says of itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from protocol.errors import (
    BadImage,
    ContextOverflow,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    TandemError,
    UpstreamLost,
)
from transport.client import HttpPool, Upstream
from workers.sglang.figures import Load, load_of
from workers.sglang.request import from_wire_text

CONTROL_TIMEOUT_S = 2.0
SERVER_INFO = {"dtype", "max_req_input_len", "max_total_num_tokens", "version"}
"""What must be in ``/server_info``."""

TOKEN_TIMEOUT_S = 25.0
"""For one token of an idle server; SGLang itself gives up after 20 s."""

ADAPTER_TIMEOUT_S = 60.0
"""For reading an adapter's weights, between two steps of whatever runs."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens. ``reason`` is set in the last one; the counts are those so far."""

    token_ids: tuple[int, ...]
    reason: str | None  # SGLang's: "stop" or "length"
    prompt_tokens: int  # images expanded
    cached_tokens: int
    # For each token, if asked for: its own log probability, and the likeliest ids with theirs.
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None = None


class AnswerTooLong(Exception):
    """``max_new_tokens`` exceeds what the context has left; without it SGLang takes what fits."""


class SglangClient:
    """One server, reached at ``base_url``."""

    def __init__(self, base_url: str, *, silence_s: float) -> None:
        self.base_url = base_url
        self.incremental = True  # chunks hold new tokens only; else all so far
        self.silence_s = silence_s
        self.adapters_changing = 0  # loads and unloads under way, which hold up the scheduler
        self._pool = HttpPool()
        self._opening: set[asyncio.Timeout] = set()
        self._streams: set[Upstream] = set()
        self._is_cut = False
        self._waiting = 0  # answers of which the next piece is awaited
        self._waiting_since_s = 0.0
        # Environment proxies are not asked: the server is on this machine or in this cluster.
        self._control = httpx.AsyncClient(
            base_url=base_url, timeout=CONTROL_TIMEOUT_S, trust_env=False
        )

    async def ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            response = await self._control.get("/ready")
            if response.status_code == 404:  # SGLang before 0.5.20
                response = await self._control.get("/health")
            return response.status_code == 200
        except httpx.TransportError:
            return False

    async def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its settings and its model, as ``/server_info`` and ``/model_info`` give them.

        Two are added to the first, which holds what one scheduler of several has: ``capacity``,
        the requests it decodes at once, and ``cache_tokens``, the size of the cache.

        Raises:
            EngineFailed: it does not answer as SGLang does.
        """
        try:
            server = (await self._control.get("/server_info", timeout=30)).raise_for_status().json()
            model = (await self._control.get("/model_info")).raise_for_status().json()
            loads = (await self._control.get("/v1/loads")).raise_for_status().json()["loads"]
            # What the schedulers settled on; the settings hold what was asked for.
            server["capacity"] = sum(load["max_running_requests"] for load in loads)
            server["cache_tokens"] = sum(load["max_total_num_tokens"] for load in loads)
            if missing := SERVER_INFO - server.keys():
                raise ValueError(f"no {', '.join(sorted(missing))}")
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            raise EngineFailed(
                f"{self.base_url} does not describe itself as an SGLang server: {exc}"
            ) from exc
        self.incremental = bool(server.get("incremental_streaming_output"))
        return server, model

    async def load(self) -> Load:
        """What its schedulers say of themselves, up to 15 decode steps ago.

        Raises:
            DeadlineExceeded, UpstreamLost: it does not answer.
            EngineFailed: it does not answer as SGLang does.
        """
        try:
            response = await self._control.get("/v1/loads", params={"include": "core,queues"})
            return load_of(response.raise_for_status().json())
        except httpx.TimeoutException as exc:
            raise DeadlineExceeded(f"{self.base_url} does not answer.") from exc
        except httpx.TransportError as exc:
            raise UpstreamLost(f"{self.base_url} is not reached: {exc}") from exc
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as exc:
            raise EngineFailed(f"{self.base_url} does not tell its load: {exc}") from exc

    async def makes_a_token(self) -> bool:
        """Whether it makes one token in time; SGLang does not ask for it while others run."""
        try:
            response = await self._control.get("/health_generate", timeout=TOKEN_TIMEOUT_S)
            return response.status_code == 200
        except httpx.TransportError:
            return False

    async def flush_cache(self) -> None:
        """Empty the prefix cache.

        Raises:
            Overloaded: requests run, or wait.
            EngineFailed: it does not answer, or not as SGLang does.
        """
        try:
            response = await self._control.post("/flush_cache", timeout=TOKEN_TIMEOUT_S)
        except httpx.TransportError as exc:
            raise EngineFailed(f"The SGLang server did not answer /flush_cache: {exc}") from exc
        if response.status_code == 400:
            raise Overloaded(
                "The cache can be flushed only while no request runs.", retry_after_s=1
            )
        if response.status_code != 200:
            raise EngineFailed(
                f"The SGLang server answered /flush_cache with status {response.status_code}."
            )

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        """The chunks of one answer; closing it closes the connection.

        Raises:
            AnswerTooLong: see there.
            TandemError: the server refuses the request, or is lost (``UpstreamLost``).
        """
        with self._awaited():
            upstream = await self._open(orjson.dumps({**body, "stream": True}))
        self._streams.add(upstream)
        try:
            if self._is_cut:  # just as the head of the response arrived
                raise self._lost()
            if upstream.status != 200:
                raise await _refusal(upstream)
            seen = 0
            buffer = b""
            while True:
                with self._awaited():
                    data = await upstream.read(self.silence_s)
                if not data:
                    return
                *frames, buffer = (buffer + data).split(b"\n\n")
                for frame in frames:
                    payload = frame.removeprefix(b"data: ")
                    if payload == b"[DONE]":
                        return
                    chunk = parse(orjson.loads(payload), skip=0 if self.incremental else seen)
                    seen += len(chunk.token_ids)
                    yield chunk
        finally:
            self._streams.discard(upstream)
            upstream.close()

    async def _open(self, body: bytes) -> Upstream:
        """The response to a request, with its head; ``cut`` ends the wait for it."""
        if self._is_cut:
            raise self._lost()
        try:
            async with asyncio.timeout(None) as opening:
                self._opening.add(opening)
                try:
                    return await self._pool.open(
                        self.base_url, "/generate", body, timeout_s=self.silence_s
                    )
                finally:
                    self._opening.discard(opening)
        except TimeoutError as exc:
            raise self._lost() from exc

    def _lost(self) -> UpstreamLost:
        return UpstreamLost(f"The connection to {self.base_url} was cut.")

    @property
    def awaited_s(self) -> float:
        """How long somebody has been waiting for a piece of an answer; 0 when nobody does."""
        return time.monotonic() - self._waiting_since_s if self._waiting else 0.0

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        if not self._waiting:
            self._waiting_since_s = time.monotonic()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def cut(self) -> None:
        """Cut the connections of all answers, those to come included: the server is done for."""
        self._is_cut = True
        while self._opening:
            self._opening.pop().reschedule(0)
        for upstream in self._streams:
            upstream.abort()

    async def abort(self, rid: str) -> None:
        """Stop a request; the server matches ids by prefix, so they must be of one length."""
        body = orjson.dumps({"rid": rid})
        upstream = await self._pool.open(
            self.base_url, "/abort_request", body, timeout_s=CONTROL_TIMEOUT_S
        )
        try:
            await upstream.read_all(CONTROL_TIMEOUT_S)
        finally:
            upstream.close()

    async def adapters(self) -> tuple[str, ...]:
        """The names of the LoRA adapters that it has loaded.

        Raises:
            EngineFailed: it does not answer as SGLang does.
        """
        try:
            response = (await self._control.get("/v1/models")).raise_for_status()
            return tuple(model["id"] for model in response.json()["data"] if model.get("parent"))
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            raise EngineFailed(f"{self.base_url} does not list its adapters: {exc}") from exc

    async def load_adapter(self, name: str, path: str) -> None:
        """Load the LoRA adapter in the directory ``path``, which the server must see.

        Raises:
            InvalidRequest: it does not take it.
            EngineFailed: it does not answer.
        """
        body = {"lora_name": name, "lora_path": path}
        message = await self._change_adapters("/load_lora_adapter", body)
        if message is not None:
            raise InvalidRequest(f"SGLang does not take the adapter: {message.rstrip('.')}.")

    async def unload_adapter(self, name: str) -> None:
        """Free a LoRA adapter, which no request uses.

        Raises:
            EngineFailed: it does not let it go.
        """
        message = await self._change_adapters("/unload_lora_adapter", {"lora_name": name})
        if message is not None:
            raise EngineFailed(f"SGLang does not free the adapter: {message.rstrip('.')}.")

    async def _change_adapters(self, route: str, body: dict[str, str]) -> str | None:
        """Why the server refuses; ``None`` when it has done it."""
        self.adapters_changing += 1
        try:
            response = await self._control.post(route, json=body, timeout=ADAPTER_TIMEOUT_S)
            if response.status_code == 400:
                return str(response.json()["error_message"])
            response.raise_for_status()
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            what = str(exc) or type(exc).__name__
            raise EngineFailed(f"The SGLang server did not answer {route}: {what}.") from exc
        finally:
            self.adapters_changing -= 1
        return None

    async def aclose(self) -> None:
        self._pool.close()
        await self._control.aclose()


async def _refusal(upstream: Upstream) -> Exception:
    body = await upstream.read_all(CONTROL_TIMEOUT_S)
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        error = body.decode(errors="replace")
    message = error.get("message", "") if isinstance(error, dict) else str(error)
    return refusal(upstream.status, message)


def parse(frame: dict[str, Any], *, skip: int = 0) -> Chunk:
    """One frame of ``/generate``; its first ``skip`` tokens are known.

    Raises:
        AnswerTooLong: see there.
        TandemError: the frame reports a refusal or an abort.
    """
    if "error" in frame:
        raise refusal(int(frame["error"].get("code") or 400), str(frame["error"].get("message")))
    meta = frame["meta_info"]
    finish = meta.get("finish_reason") or {}
    if finish.get("type") == "abort":
        raise refusal(int(finish.get("status_code") or 500), str(finish.get("message")))
    return Chunk(
        token_ids=tuple(frame.get("output_ids") or ())[skip:],
        reason=finish.get("type"),
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        logprobs=_logprobs(meta, skip),
    )


def _logprobs(
    meta: dict[str, Any], skip: int
) -> tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None:
    """SGLang gives ``[logprob, id, text]`` for each token, and a list of such for the likeliest."""
    own = meta.get("output_token_logprobs")
    if own is None:
        return None
    top = meta.get("output_top_logprobs") or [()] * len(own)
    return tuple(
        (logprob, tuple((token_id, value) for value, token_id, *_ in likeliest))
        for (logprob, *_), likeliest in zip(own[skip:], top[skip:], strict=True)
    )


_TOO_LONG = (
    "is longer than the model's context length",
    "exceeds the maximum allowed length",
    "too long after expanding",
    "exceeds the KV memory budget",
)


def refusal(status: int, message: str) -> Exception:
    """What SGLang refuses with ``status`` and ``message``, as an error of ours."""
    if (known := from_wire_text(message)) is not None:
        return known
    # Its sentences may hold what the client sent; they go to that client only.
    sentence = f"SGLang refused the request: {message.rstrip('.')}."
    lowered = message.lower()
    error: type[TandemError]
    if "out of memory" in lowered:
        error = OutOfMemory
    elif status in (429, 503):
        error = Overloaded
    elif not 400 <= status < 500:
        return EngineFailed(f"SGLang failed: {message.rstrip('.')}.")
    elif "requested token count exceeds" in lowered:
        return AnswerTooLong(message)
    elif any(words in message for words in _TOO_LONG):
        error = ContextOverflow
    elif "while loading image" in lowered or "decode image" in lowered:
        error = BadImage
    else:
        error = InvalidRequest
    return error(sentence)
