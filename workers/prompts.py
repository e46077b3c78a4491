"""From a request to the text the model reads; the same for every kind, so that the tokens are.

The chat template belongs to the model's own processor (law L4); this only feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import InvalidRequest, Unsupported
from protocol.messages import IMAGE_PLACEHOLDER, ChatMessage, GenerateRequest, ImagePart, TextPart

ApplyTemplate = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True, slots=True)
class PromptText:
    """What the tokenizer gets; one ``image_token`` stands for each image."""

    text: str
    add_special_tokens: bool  # a chat template has written them already


def render(
    request: GenerateRequest, *, image_token: str | None, apply_template: ApplyTemplate | None
) -> PromptText:
    """Write the prompt of ``request`` for a model with this ``image_token`` and chat template.

    Raises:
        InvalidRequest: the model has no chat template, the template refuses the messages, or the
            text holds the model's own image token so that the placeholders no longer match the
            images.
        Unsupported: images for a model without an ``image_token``.
    """
    if request.images and image_token is None:
        raise Unsupported("This model takes no images.", remedy="Choose a vision-language model.")
    if request.prompt is not None:
        text = request.prompt
        if image_token is not None:
            text = text.replace(IMAGE_PLACEHOLDER, image_token)
    elif apply_template is None:
        raise InvalidRequest(
            "This model has no chat template.", remedy="Send prompt instead of messages."
        )
    else:
        turns = [_turn(turn, as_parts=image_token is not None) for turn in request.messages or ()]
        try:
            text = apply_template(turns)
        except Exception as exc:  # a template may raise anything on odd turns
            raise InvalidRequest(
                f"The model's chat template refused the messages: {exc}",
                remedy="Let user and assistant take turns, or send prompt instead of messages.",
            ) from exc
    if image_token is not None and text.count(image_token) != len(request.images):
        raise InvalidRequest(
            f"The text holds {text.count(image_token)} {image_token} for {len(request.images)} "
            "images.",
            remedy=f"Remove the literal {image_token} from the text.",
        )
    return PromptText(text, add_special_tokens=request.prompt is not None)


def _turn(turn: ChatMessage, *, as_parts: bool) -> dict[str, Any]:
    """One turn as templates expect it: a list of parts for a VLM, a string for a plain LLM."""
    parts = turn.parts
    if as_parts:
        return {"role": turn.role, "content": [part.model_dump() for part in parts]}
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    return {"role": turn.role, "content": text}


def write(
    turns: Sequence[ChatMessage],
    *,
    tokenizer: Any,
    image_token: str | None,
    apply_template: ApplyTemplate | None,
) -> str:
    """The prompt that is read as ``turns``; ``Engine.write``, which says what is raised."""
    images = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    request = GenerateRequest(model="any", messages=tuple(turns), images=("",) * images)
    text = render(request, image_token=image_token, apply_template=apply_template).text
    text = text.removeprefix(_opening(tokenizer))
    return text if image_token is None else text.replace(image_token, IMAGE_PLACEHOLDER)


def _opening(tokenizer: Any) -> str:
    """What the tokenizer puts before every prompt: the beginning-of-sequence token, or nothing."""
    ids: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = next((at for at in range(len(ids)) if ids[at : at + len(plain)] == plain), 0)
    text: str = tokenizer.decode(ids[:before]) if before else ""
    return text


def count_tokens(text: str, *, tokenizer: Any, image_tokens: int) -> int:
    """The tokens of a prompt with images of ``image_tokens`` each."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    count = len(tokenizer(first)["input_ids"]) + image_tokens * len(rest)
    return count + sum(len(tokenizer(r, add_special_tokens=False)["input_ids"]) for r in rest)


def template_of(*owners: Any) -> ApplyTemplate | None:
    """The chat template of the first of ``owners`` (processor, tokenizer) that has one."""
    owner = next((owner for owner in owners if getattr(owner, "chat_template", None)), None)
    if owner is None:
        return None

    def apply(turns: list[dict[str, Any]]) -> str:
        text: str = owner.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    return apply


def pictures_for(processor: Any, pictures: Sequence[Any]) -> list[Any]:
    """The pictures of one conversation as ``processor`` takes them.

    One that counts them (LLaVA-OneVision's, which cuts a picture into tiles only if it is alone)
    takes those of a plain list for as many conversations.
    """
    image_processor = getattr(processor, "image_processor", None)
    counts = "batch_num_images" in getattr(image_processor, "model_input_names", ())
    return [list(pictures)] if counts else list(pictures)


def check_resumable(
    token_ids: Sequence[int], *, vocab_size: int, image_token_id: int | None
) -> None:
    """Raises InvalidRequest: this model cannot have generated ``token_ids``.

    An id outside the vocabulary fails no request, but ends SGLang's server and, on an
    accelerator, the whole process.
    """
    if any(not 0 <= token_id < vocab_size for token_id in token_ids):
        raise InvalidRequest(
            f"resume_token_ids holds an id outside the vocabulary of {vocab_size}."
        )
    if image_token_id is not None and image_token_id in token_ids:
        raise InvalidRequest("resume_token_ids holds the id that stands for an image.")
