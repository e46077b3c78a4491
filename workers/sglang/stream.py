"""One request to the SGLang server: its tokens in chunks, aborted if they are not all read."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

import anyio

from protocol.errors import DeadlineExceeded, EngineFailed, TandemError, UpstreamLost
from protocol.events import Delta
from workers.answer import Answer
from workers.logprobs import token_logprob
from workers.sglang.client import AnswerTooLong, Chunk, SglangClient
from workers.sglang.watch import Watch

ABORT_AGAIN_AFTER_S = (0.01, 0.02, 0.03)


async def stream(client: SglangClient, watch: Watch, body: dict[str, Any]) -> AsyncGenerator[Chunk]:
    """The answer to ``body`` in chunks; closing the generator aborts it.

    Raises:
        TandemError: the server refuses the request, or is lost.
    """
    try:
        async with aclosing(_attempt(client, watch, body)) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    except AnswerTooLong:
        # The images take part of the context, and only the server knows how much.
        sampling = body["sampling_params"] | {"max_new_tokens": None}
    unlimited = body | {"sampling_params": sampling}
    async with aclosing(_attempt(client, watch, unlimited)) as chunks:
        async for chunk in chunks:
            yield chunk


async def _attempt(
    client: SglangClient, watch: Watch, body: dict[str, Any]
) -> AsyncGenerator[Chunk]:
    """One request under an id of its own."""
    rid = uuid.uuid4().hex
    ended = begun = False
    try:
        with watch.request() as heard:
            async with aclosing(client.generate(body | {"rid": rid})) as chunks:
                async for chunk in chunks:
                    heard()
                    begun = True
                    ended = chunk.reason is not None
                    yield chunk
    except DeadlineExceeded as exc:
        raise EngineFailed(
            f"The SGLang server has produced nothing for {client.silence_s:g} s.",
            remedy="If it only is slow, raise --hang-timeout-s.",
        ) from exc
    except UpstreamLost as exc:
        ended = True
        raise await watch.reason(exc) from exc
    except (AnswerTooLong, TandemError):
        ended = True
        raise
    finally:
        if not ended:
            # An id the server has not read yet cannot be aborted, so it may take several.
            with anyio.move_on_after(1, shield=True), suppress(TandemError):
                await client.abort(rid)
                for pause_s in () if begun else ABORT_AGAIN_AFTER_S:
                    await asyncio.sleep(pause_s)
                    await client.abort(rid)


def push(answer: Answer, chunk: Chunk, spell: Callable[[list[int]], str]) -> Delta:
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
    logprobs = None
    if chunk.logprobs is not None:
        logprobs = tuple(
            token_logprob(token_id, logprob, likeliest, spell)
            for token_id, (logprob, likeliest) in zip(
                chunk.token_ids[:taken], chunk.logprobs[:taken], strict=True
            )
        )
    return Delta(text=text, token_ids=chunk.token_ids[:taken], logprobs=logprobs)
