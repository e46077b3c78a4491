"""The checkpoint as the worker sees it: its tokenizer, chat template and limits, no weights."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import EngineFailed, InvalidRequest
from protocol.messages import GenerateRequest
from workers.answer import eos_ids
from workers.prompts import ApplyTemplate, check_resumable, render, template_of


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What turns requests into token ids and back; safe to use from several threads."""

    tokenizer: Any
    apply_template: ApplyTemplate | None
    image_token: str | None
    image_token_id: int | None
    image_tokens: int  # an image takes, for estimates; 0 for a model that takes none
    eos_ids: frozenset[int]
    vocab_size: int
    precision: str  # the checkpoint's own
    # Tokenizers raise "Already borrowed" when one thread sets padding while another encodes.
    encoding: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, request: GenerateRequest) -> list[int]:
        """The prompt, one id for each image, and the tokens to go on from behind it.

        Raises:
            InvalidRequest, Unsupported: the request is no prompt for this model.
        """
        prompt = render(request, image_token=self.image_token, apply_template=self.apply_template)
        with self.encoding:
            encoded = self.tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens)
        ids: list[int] = encoded["input_ids"]
        if not ids:
            raise InvalidRequest("The prompt is empty.")
        check_resumable(
            request.resume_token_ids,
            vocab_size=self.vocab_size,
            image_token_id=self.image_token_id,
        )
        return [*ids, *request.resume_token_ids]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def load(path: str, *, trust_remote_code: bool) -> Checkpoint:
    """Load the tokenizer and the processor at ``path``; blocking, seconds of imports.

    Raises:
        EngineFailed: they are not there or cannot be read.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return _load(path, trust_remote_code)
    except Exception as exc:
        line = next(iter(str(exc).splitlines()), "")
        raise EngineFailed(
            f"The tokenizer or processor of {path} cannot be loaded: {type(exc).__name__}: {line}",
            remedy="Give --model-path a directory, or the id of a model on the Hugging Face hub.",
        ) from exc


def _load(path: str, trust: bool) -> Checkpoint:
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    text_config = config.get_text_config()
    processor: Any = None
    if hasattr(config, "vision_config"):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        tokenizer = processor.tokenizer
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    image_token: str | None = getattr(processor, "image_token", None)
    return Checkpoint(
        tokenizer=tokenizer,
        apply_template=template_of(processor, tokenizer),
        image_token=image_token,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token) if image_token else None,
        image_tokens=_image_tokens(config) if image_token else 0,
        eos_ids=_eos_ids(path, text_config, tokenizer),
        vocab_size=text_config.vocab_size,
        precision=str(config.dtype).removeprefix("torch."),
    )


def _image_tokens(config: Any) -> int:
    """LLaVA's number; models that vary it with the size of the picture get LLaVA-1.5's."""
    return int(getattr(config, "image_seq_length", None) or 576)


def _eos_ids(path: str, text_config: Any, tokenizer: Any) -> frozenset[int]:
    from transformers import GenerationConfig

    sources = [text_config, tokenizer]
    with suppress(OSError):  # a checkpoint need not have one
        sources.append(GenerationConfig.from_pretrained(path))
    return eos_ids(*sources)
