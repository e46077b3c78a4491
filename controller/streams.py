"""The routes that stream: raw ASGI endpoints, as a token passes through nothing it need not.

Each reads a body, has it pass the intake, and answers with the generator's frames: LLaVA's and
FastChat's routes as they are or in their words, OpenAI's in its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from controller import fastchat
from controller.accounts import Accounts, Asker
from controller.callers import Caller
from controller.fetch import ImageFetcher
from controller.generation import Generator
from controller.intake import Intake
from controller.openai.answers import Answer
from controller.openai.requests import ChatCompletionRequest, CompletionRequest
from protocol.errors import TandemError, TooLarge
from protocol.events import NUL_MEDIA_TYPE, SSE_MEDIA_TYPE, NulEncoder, SseDecoder
from protocol.messages import GenerateRequest
from transport import asgi
from transport.fastchat import failures_as_frames, has_sent, refusal, whole

_BODIES_OF_CHOICES = 4
"""Bodies of the largest size that the choices of one request may take together."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What the streaming routes are made of."""

    max_body_bytes: int
    intake: Intake
    fetcher: ImageFetcher
    generator: Generator
    accounts: Accounts


class Generate:
    """``POST /worker_generate_stream``: LLaVA's route, in either framing; and FastChat's
    ``/worker_generate``, the ``whole`` answer in one piece."""

    def __init__(self, serving: Serving, *, whole: bool) -> None:
        self._serving = serving
        self._whole = whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = asgi.request_id(scope)
        asker = Asker.of(scope)
        limit_bytes = self._serving.max_body_bytes
        sse = asgi.accepts_sse(scope)
        body = b""
        try:
            body = await asgi.read_body(scope, receive, limit_bytes=limit_bytes)
            asked = asgi.parse(GenerateRequest, body)
            request = self._serving.intake.accept(asked, asker.caller)
        except asgi.ClientLeft:
            return
        except TandemError as error:
            self._serving.accounts.refused(error, request_id, asker)
            if sse or not has_sent(body):
                await asgi.send_error(send, error, _id_header(request_id))
                return
            told = refusal(error, whole=self._whole)
            headers = _id_header(request_id)
            await asgi.respond(receive, send, told, media_type=self._media_type, headers=headers)
            return
        if request is not asked:
            body = _dumped(request)
        request_id = request.request_id or request_id
        asker.reply.extend(_id_header(request_id))
        frames = self._serving.generator.stream(request, body, request_id, asker)
        sse = sse and not self._whole
        await asgi.respond(
            receive,
            send,
            frames if sse else self._in_their_words(frames, request),
            media_type=SSE_MEDIA_TYPE if sse else self._media_type,
            headers=asker.reply,
        )

    @property
    def _media_type(self) -> str:
        return "application/json" if self._whole else NUL_MEDIA_TYPE

    def _in_their_words(
        self, frames: AsyncGenerator[bytes], request: GenerateRequest
    ) -> AsyncGenerator[bytes]:
        prompt = (request.prompt or "") if request.echo else ""
        if self._whole:
            return whole(fastchat.events_of(frames), prompt)
        chunks = _cumulative(frames, prompt)
        return chunks if request.echo else failures_as_frames(chunks, prompt)


class OpenAI:
    """One of OpenAI's routes, streamed or whole."""

    def __init__(
        self, serving: Serving, shape: type[ChatCompletionRequest | CompletionRequest]
    ) -> None:
        self._serving = serving
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = asgi.request_id(scope)
        asker = Asker.of(scope)
        asker.reply.extend(_id_header(request_id))
        limit_bytes = self._serving.max_body_bytes
        try:
            body = await asgi.read_body(scope, receive, limit_bytes=limit_bytes)
            asked = asgi.parse(self._shape, body)
            requests = self._requests(asked, len(body), asker.caller)
            named_by_address = self._serving.fetcher.check(requests[0].images)
        except asgi.ClientLeft:
            return
        except TandemError as error:
            self._serving.accounts.refused(error, request_id, asker)
            await asgi.send_error(send, error, asker.reply)
            return
        answered = self._fetched if named_by_address else self._answered
        await asgi.respond(
            receive,
            send,
            answered(asked, requests, request_id, asker),
            media_type=SSE_MEDIA_TYPE if asked.stream else "application/json",
            headers=asker.reply,
        )

    def _requests(
        self, asked: ChatCompletionRequest | CompletionRequest, body_bytes: int, caller: Caller
    ) -> list[GenerateRequest]:
        """One of our requests for each answer; raises ``RequestError``."""
        intake, limit_bytes = self._serving.intake, self._serving.max_body_bytes
        requests = [
            intake.accept(asgi.validate(GenerateRequest, fields), caller)
            for fields in asked.as_fields(intake.max_tokens)
        ]
        if body_bytes * len(requests) > _BODIES_OF_CHOICES * limit_bytes:
            raise TooLarge(
                f"n: {len(requests)} answers to a body of {body_bytes} bytes are too many.",
                remedy="Ask for fewer at once.",
                param="n",
            )
        return requests

    def _answered(
        self,
        asked: ChatCompletionRequest | CompletionRequest,
        requests: list[GenerateRequest],
        request_id: str,
        asker: Asker,
    ) -> AsyncGenerator[bytes]:
        streams = [
            self._serving.generator.stream(
                request,
                _dumped(request),
                f"{request_id}-{index}" if index else request_id,
                asker,
            )
            for index, request in enumerate(requests)
        ]
        answer = Answer(asked, request_id)
        return answer.chunks(streams) if asked.stream else answer.whole(streams)

    async def _fetched(
        self,
        asked: ChatCompletionRequest | CompletionRequest,
        requests: list[GenerateRequest],
        request_id: str,
        asker: Asker,
    ) -> AsyncGenerator[bytes]:
        """As ``_answered``, after the images that are named by address have been fetched."""
        try:
            images = {"images": await self._serving.fetcher.fetched(requests[0].images)}
        except TandemError as error:
            self._serving.accounts.refused(error, request_id, asker)
            raise
        whole = [request.model_copy(update=images) for request in requests]
        async with aclosing(self._answered(asked, whole, request_id, asker)) as chunks:
            async for chunk in chunks:
                yield chunk


def _dumped(request: GenerateRequest) -> bytes:
    return request.model_dump_json(exclude_none=True).encode()


async def _cumulative(frames: AsyncGenerator[bytes], prompt: str) -> AsyncGenerator[bytes]:
    """SSE frames as LLaVA's."""
    decoder, encoder = SseDecoder(), NulEncoder(prompt)
    async with aclosing(frames):
        async for data in frames:
            out = b"".join(encoder.encode(event) for event in decoder.feed(data))
            yield asgi.LastChunk(out) if isinstance(data, asgi.LastChunk) else out


def _id_header(request_id: str) -> list[tuple[bytes, bytes]]:
    return [(asgi.REQUEST_ID_HEADER, request_id.encode())]
