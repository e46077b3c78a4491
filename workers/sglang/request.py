"""From a request to the body of SGLang's ``/generate``; plain functions."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from protocol.errors import Unsupported
from protocol.messages import GenerateRequest
from workers.images import Picture


def check(request: GenerateRequest) -> None:
    """Raises Unsupported: SGLang would not do what the request says."""
    if request.resume_token_ids and request.repetition_penalty != 1.0:
        # It would not know the resumed tokens for its own, and so not punish them.
        raise Unsupported("SGLang cannot resume an answer with a repetition_penalty.")


def body_of(
    request: GenerateRequest,
    ids: Sequence[int],
    images: Sequence[Picture],
    *,
    max_new_tokens: int,
    seeded: bool,
) -> dict[str, Any]:
    """The prompt as ``ids``, one of them for each image; the images as PNGs that we wrote.

    Nothing that a client sent reaches SGLang as an image: it would open paths and URLs.
    """
    body: dict[str, Any] = {
        "input_ids": ids,
        "sampling_params": _sampling(request, max_new_tokens, seeded),
    }
    if images:
        body["image_data"] = [base64.b64encode(image.png()).decode() for image in images]
    return body


def _sampling(request: GenerateRequest, max_new_tokens: int, seeded: bool) -> dict[str, Any]:
    likeliest_only = request.top_p == 0
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": request.temperature,
        "top_p": 1.0 if likeliest_only else request.top_p,
        "top_k": 1 if likeliest_only else request.top_k or -1,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "stop": list(request.stop),
    }
    if seeded and request.seed is not None:
        sampling["sampling_seed"] = request.seed
    return sampling
