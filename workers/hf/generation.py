"""One generation, from request to ``Finished``, in the thread that called it."""

from __future__ import annotations

import inspect
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteriaList

from protocol.errors import BadImage, ContextOverflow, EngineFailed, InvalidRequest, TandemError
from protocol.events import Delta, Finished
from protocol.messages import IMAGE_PLACEHOLDER, GenerateRequest
from workers.answer import Answer
from workers.hf import cancel, failures, sampling
from workers.hf.model import HfModel
from workers.images import Picture
from workers.prompts import check_resumable, render
from workers.text import TextStream

log = logging.getLogger(__name__)

Inputs = dict[str, torch.Tensor]


def generate(
    model: HfModel,
    request: GenerateRequest,
    images: Sequence[Picture],
    *,
    emit: Callable[[Delta], None],
    cancelled: threading.Event,
) -> Finished:
    """Answer ``request``; ``emit`` gets a delta for each new token, in this thread.

    Raises:
        BadImage, ContextOverflow, InvalidRequest, Unsupported: the request cannot be served.
        EngineFailed, OutOfMemory: it could not be served, or ``cancelled`` was set.
    """
    try:
        with cancel.cancellable(cancelled), torch.inference_mode():
            return _generate(model, request, images, emit)
    except TandemError:
        raise
    except cancel.Cancelled as exc:  # seen only by those whose engine was closed under them
        raise EngineFailed("The worker stopped before the answer was complete.") from exc
    except Exception as exc:
        log.exception("generation failed")
        # Its frames hold the tensors of the failed forward pass for as long as the error lives.
        traceback.clear_frames(exc.__traceback__)
        raise failures.as_typed(exc) from exc


def _generate(
    model: HfModel,
    request: GenerateRequest,
    images: Sequence[Picture],
    emit: Callable[[Delta], None],
) -> Finished:
    check_resumable(
        request.resume_token_ids,
        vocab_size=model.vocab_size,
        image_token_id=model.image_token_id,
    )
    inputs = encode(model, request, images)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens >= model.context_length:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens with its {len(images)} images; this worker "
            f"takes {model.context_length} with the answer."
        )
    answer = Answer(
        TextStream(model.decode, request.stop),
        eos_ids=model.eos_ids,
        max_tokens=min(request.max_new_tokens, model.context_length - prompt_tokens),
    )
    answer.resume(request.resume_token_ids)
    if answer.reason is None:
        cancel.check()
        _decode(model, _resumed(model, inputs, request), request, prompt_tokens, answer, emit)
    if answer.reason is None:
        raise RuntimeError("the model stopped before its answer was complete")
    return Finished(
        reason=answer.reason, prompt_tokens=prompt_tokens, completion_tokens=answer.tokens
    )


def encode(model: HfModel, request: GenerateRequest, images: Sequence[Picture]) -> Inputs:
    """The prompt as tensors of one row, images expanded to their tokens.

    Raises:
        BadImage: the model's processor refuses an image.
        InvalidRequest, Unsupported: the request is no prompt for this model.
    """
    prompt = render(request, image_token=model.image_token, apply_template=model.apply_template)
    with model.encoding:
        if images:
            inputs = _encode_images(model, prompt.text, prompt.add_special_tokens, images)
        else:
            ids = model.tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens)
            inputs = {"input_ids": torch.tensor([ids["input_ids"]], dtype=torch.long)}
    if inputs["input_ids"].shape[1] == 0:
        raise InvalidRequest("The prompt is empty.")
    return inputs


def _encode_images(
    model: HfModel, text: str, add_special_tokens: bool, images: Sequence[Picture]
) -> Inputs:
    try:
        batch = model.processor(
            images=[image.pixels for image in images],
            text=text,
            add_special_tokens=add_special_tokens,
            return_tensors="pt",
        )
    except ValueError as exc:
        raise BadImage(
            f"The model's image processor refused an image: {failures.one_line(exc)}",
            remedy="Send an image of a more usual size and shape.",
        ) from exc
    # Some tokenizers add them unasked, and generate() refuses what the network does not take.
    if "token_type_ids" not in inspect.signature(model.network.forward).parameters:
        batch.pop("token_type_ids", None)
    return dict(batch)


def _resumed(model: HfModel, inputs: Inputs, request: GenerateRequest) -> Inputs:
    """``inputs`` with the tokens already generated behind the prompt, on the model's device."""
    ids = inputs["input_ids"]
    tail = torch.tensor([request.resume_token_ids], dtype=ids.dtype)
    longer = {
        name: torch.cat([value, torch.zeros_like(tail, dtype=value.dtype)], dim=1)
        if value.shape == ids.shape  # per token, as mm_token_type_ids: 0 is text
        else value
        for name, value in inputs.items()
    }
    longer["input_ids"] = torch.cat([ids, tail], dim=1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    dtype = model.network.dtype
    return {
        name: value.to(model.device, dtype if value.is_floating_point() else None)
        for name, value in longer.items()
    }


def _decode(
    model: HfModel,
    inputs: Inputs,
    request: GenerateRequest,
    prompt_tokens: int,
    answer: Answer,
    emit: Callable[[Delta], None],
) -> None:
    def step(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called by generate() after each token; true ends the answer."""
        cancel.check()
        token_id = int(input_ids[0, -1])
        emit(Delta(text=answer.push(token_id), token_ids=(token_id,)))
        return torch.tensor([answer.reason is not None], device=input_ids.device)

    model.network.generate(
        **inputs,
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=answer.tokens_left),
        logits_processor=sampling.processors(request, prompt_tokens=prompt_tokens),
        stopping_criteria=StoppingCriteriaList([step]),
    )


def warm_up(model: HfModel) -> int:
    """Generate two tokens, with an image if the model sees; return the tokens that image took.

    Raises:
        EngineFailed: the model loads but cannot answer.
    """
    pictures = [Picture(Image.new("RGB", (336, 336), "gray"))] if model.image_token else []
    text = f"{IMAGE_PLACEHOLDER * len(pictures)}\nHello"
    if model.apply_template is None:
        asked: dict[str, Any] = {"prompt": text}
    else:
        asked = {"messages": [{"role": "user", "content": text}]}
    request = GenerateRequest(
        model="warm-up", images=("gray",) * len(pictures), max_new_tokens=2, **asked
    )
    try:
        ids = encode(model, request, pictures)["input_ids"]
        generate(model, request, pictures, emit=lambda _: None, cancelled=threading.Event())
    except TandemError as exc:
        raise EngineFailed(f"The model loads but cannot answer: {exc.message}") from exc
    return int((ids == model.image_token_id).sum()) if pictures else 0
