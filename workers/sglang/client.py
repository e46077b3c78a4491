"""SGLang's HTTP interface: one stream of tokens, an abort, and what the server says of itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from protocol.errors import (
    BadImage,
    ContextOverflow,
    EngineFailed,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    TandemError,
)
from transport.client import HttpPool, Upstream

CONTROL_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens. ``reason`` is set in the last one; the counts are those so far."""

    token_ids: tuple[int, ...]
    reason: str | None  # SGLang's: "stop" or "length"
    prompt_tokens: int  # images expanded
    cached_tokens: int


class AnswerTooLong(Exception):
    """``max_new_tokens`` exceeds what the context has left; without it SGLang takes what fits."""


class SglangClient:
    """One server, reached at ``base_url``."""

    def __init__(self, base_url: str, *, silence_s: float) -> None:
        self.base_url = base_url
        self.incremental = True  # chunks hold new tokens only; else all so far
        self._silence_s = silence_s
        self._pool = HttpPool()
        # Environment proxies are not asked: the server is on this machine or in this cluster.
        self._control = httpx.AsyncClient(
            base_url=base_url, timeout=CONTROL_TIMEOUT_S, trust_env=False
        )

    async def ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            return (await self._control.get("/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its settings and its model, as ``/server_info`` and ``/model_info`` give them.

        ``capacity`` is added to the first: the requests it decodes at once.

        Raises:
            EngineFailed: it does not answer as SGLang does.
        """
        try:
            server = (await self._control.get("/server_info", timeout=30)).raise_for_status().json()
            model = (await self._control.get("/model_info")).raise_for_status().json()
            loads = (await self._control.get("/v1/loads")).raise_for_status().json()["loads"]
            # What the schedulers settled on; the settings hold what was asked for.
            server["capacity"] = sum(load["max_running_requests"] for load in loads)
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            raise EngineFailed(
                f"{self.base_url} does not describe itself as an SGLang server: {exc}"
            ) from exc
        self.incremental = bool(server.get("incremental_streaming_output"))
        return server, model

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        """The chunks of one answer; closing it closes the connection.

        Raises:
            AnswerTooLong: see there.
            TandemError: the server refuses the request, or is lost (``UpstreamLost``).
        """
        upstream = await self._pool.open(
            self.base_url,
            "/generate",
            orjson.dumps({**body, "stream": True}),
            timeout_s=self._silence_s,
        )
        try:
            if upstream.status != 200:
                raise await _refusal(upstream)
            seen = 0
            buffer = b""
            while data := await upstream.read(self._silence_s):
                *frames, buffer = (buffer + data).split(b"\n\n")
                for frame in frames:
                    payload = frame.removeprefix(b"data: ")
                    if payload == b"[DONE]":
                        return
                    chunk = parse(orjson.loads(payload), skip=0 if self.incremental else seen)
                    seen += len(chunk.token_ids)
                    yield chunk
        finally:
            upstream.close()

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
    )


_TOO_LONG = (
    "is longer than the model's context length",
    "exceeds the maximum allowed length",
    "too long after expanding",
    "exceeds the KV memory budget",
)


def refusal(status: int, message: str) -> Exception:
    """What SGLang refuses with ``status`` and ``message``, as an error of ours."""
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
