"""Requests in the words of LLaVA's and FastChat's workers, which know only some of ours."""

from __future__ import annotations

import orjson

from protocol.messages import (
    FASTCHAT,
    LLAVA,
    GenerateRequest,
    Registration,
    WorkerState,
    WorkerStatus,
)

_SENTENCE_END = "</s>"
"""LLaVA's worker fails without a stop string; this one ends its models' answers anyway."""


def is_foreign(status: WorkerStatus) -> bool:
    """Whether this is the status of a worker that does not speak our protocol."""
    return status.protocol_version == 0


def described(status: WorkerStatus, registration: Registration) -> WorkerStatus:
    """What a worker that registers can do, as far as it does not say so itself.

    FastChat's says beside its status whether it sees pictures; LLaVA's says nothing and does.
    """
    if not is_foreign(status):
        return status
    if registration.multimodal is None:
        return status.model_copy(update={"kind": "llava", "capabilities": LLAVA})
    can = FASTCHAT.model_copy(update={"images": registration.multimodal})
    return status.model_copy(update={"kind": "fastchat", "capabilities": can})


def not_yet_listening(status: WorkerStatus) -> WorkerStatus:
    """The ``status`` that LLaVA's or FastChat's worker registers with: it listens only after."""
    return status.model_copy(
        update={"state": WorkerState.STARTING, "progress": "registered before it listens"}
    )


def as_known(status: WorkerStatus, known: WorkerStatus) -> WorkerStatus:
    """A later ``status`` of a worker that has told what it can do when it registered."""
    if not is_foreign(status):
        return status
    return status.model_copy(update={"kind": known.kind, "capabilities": known.capabilities})


def echoed(request: GenerateRequest, status: WorkerStatus) -> str:
    """What the frames of a worker may begin with before the answer."""
    return "" if status.kind == "fastchat" else request.prompt or ""


def body_of(request: GenerateRequest, body: bytes) -> bytes:
    """``request``, which came as ``body``, as both understand it; it needs nothing they lack.

    LLaVA's takes one stop string and needs one; the others are watched for where its frames are
    read. Only FastChat's knows ``echo``, and drops special tokens from a prompt that it echoes.
    """
    fields = {
        **orjson.loads(body),  # with what only they know, such as stop_token_ids
        "model": request.model,
        "prompt": request.prompt or "",
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k or -1,
        "repetition_penalty": request.repetition_penalty,
        "max_new_tokens": request.max_new_tokens,
        "stop": request.stop[0] if request.stop else _SENTENCE_END,
        "echo": False,
    }
    if request.images:
        fields["images"] = [image.rpartition(",")[2] for image in request.images]
    return orjson.dumps(fields)
