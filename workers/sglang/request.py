"""From a request to the body of SGLang's ``/generate``; plain functions."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from protocol.errors import EngineFailed, TandemError, Unsupported, from_wire
from protocol.messages import GenerateRequest, SamplingParams
from workers.grammar_limits import check_regex, check_schema
from workers.images import Picture

GRAMMAR_BACKEND = "tandem"
"""SGLang's name for grammars as the other kinds have them (``server.grammar``). A server that has
it was started by us, and so does all that ``server.hooks`` says."""

RESUMED = "resumed_tokens"
"""In ``custom_params``: how many of the last tokens of the prompt are the answer's."""

NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""The penalties, here as in SGLang, and the values that change nothing."""


class GrammarSpec(SamplingParams):
    """What ``server.grammar`` needs to know: ``json_schema`` or ``regex``, and these."""

    never: tuple[int, ...] = ()  # ids that may not come, such as that of an image
    resumed: tuple[int, ...] = ()  # ids that are there already


WIRE_MARK = "Tandem says: "
"""What an error of ours begins with in SGLang's sentences; it may hold what a client sent."""


def wire_text(error: TandemError) -> str:
    """``error`` as text that SGLang may put behind its own words."""
    return WIRE_MARK + orjson.dumps([error.code, error.message, error.remedy]).decode()


def from_wire_text(text: str) -> TandemError | None:
    """The error that was put into ``text`` with ``wire_text``."""
    _, mark, found = text.partition(WIRE_MARK)
    if not mark:
        return None
    try:
        return from_wire(*orjson.loads(found))
    except (orjson.JSONDecodeError, TypeError):
        return EngineFailed(text)


def check(request: GenerateRequest, *, seeded: bool, ours: bool) -> None:
    """Let a request pass that SGLang would answer as it is meant.

    Raises:
        Unsupported: it would not.
    """
    if seeded and request.min_p > 0:
        raise Unsupported(
            "An SGLang server with seeds cannot sample with min_p.",
            remedy="Leave min_p out; top_p and top_k work.",
        )
    if ours or not request.resume_token_ids:
        return
    for penalty, neutral in NEUTRAL.items():
        if getattr(request, penalty) != neutral:
            # It would not know the resumed tokens for its own, and so not punish them.
            raise Unsupported(f"SGLang cannot resume an answer with a {penalty}.")
    if "grammar" in request.needs:
        raise Unsupported("SGLang cannot resume an answer inside a json_schema or regex.")


def body_of(
    request: GenerateRequest,
    ids: Sequence[int],
    images: Sequence[Picture],
    *,
    max_new_tokens: int,
    seeded: bool,
    ours: bool,
    eos_ids: Iterable[int] = (),
    image_token_id: int | None = None,
) -> dict[str, Any]:
    """The prompt as ``ids``, one of them for each image; the images as PNGs that we wrote.

    Nothing that a client sent reaches SGLang as an image: it would open paths and URLs.

    Raises:
        InvalidRequest: the grammar is wrong or would cost too much.
    """
    sampling = _sampling(request, max_new_tokens) | {"stop_token_ids": sorted(eos_ids)}
    if seeded:  # all of its requests have one; SGLang's own is always the same
        seed = secrets.randbits(63) if request.seed is None else request.seed
        sampling["sampling_seed"] = seed
    if ours and request.resume_token_ids:
        sampling["custom_params"] = {RESUMED: len(request.resume_token_ids)}
    if "grammar" in request.needs:
        sampling |= _grammar(request, image_token_id) if ours else _grammar_of_sglang(request)
    body: dict[str, Any] = {"input_ids": ids, "sampling_params": sampling}
    if request.logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": request.logprobs}
    if images:
        body["image_data"] = [base64.b64encode(image.png()).decode() for image in images]
    return body


def _sampling(request: GenerateRequest, max_new_tokens: int) -> dict[str, Any]:
    likeliest_only = request.top_p == 0
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": request.temperature,
        "top_p": 1.0 if likeliest_only else request.top_p,
        "top_k": 1 if likeliest_only else request.top_k or -1,
        "min_p": request.min_p,
        **{penalty: getattr(request, penalty) for penalty in NEUTRAL},
        "stop": list(request.stop),
    }


def _grammar(request: GenerateRequest, image_token_id: int | None) -> dict[str, str]:
    spec = GrammarSpec(
        json_schema=request.json_schema,
        regex=request.regex,
        never=() if image_token_id is None else (image_token_id,),
        resumed=request.resume_token_ids,
    )
    return {"json_schema": spec.model_dump_json(exclude_defaults=True)}


def _grammar_of_sglang(request: GenerateRequest) -> dict[str, str]:
    if request.json_schema is not None:
        check_schema(request.json_schema)
        return {"json_schema": request.json_schema}
    assert request.regex is not None
    return {"regex": check_regex(request.regex)}
