"""The checkpoint as the worker sees it: its tokenizer, chat template and limits, no weights."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from protocol.errors import EngineFailed, InvalidRequest
from protocol.messages import ChatMessage, GenerateRequest
from workers import templates
from workers.answer import eos_ids
from workers.prompts import (
    ApplyTemplate,
    PromptText,
    check_resumable,
    count_tokens,
    pictures_for,
    render,
    template_of,
    write,
)

if TYPE_CHECKING:
    from workers.sglang.original import Original

LLAVA_IMAGE_TOKENS = 576
"""Tokens of a picture, where the checkpoint does not say."""


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
    cache_values: int = 0  # numbers that the cache holds for one token; 0: not known
    conversation: templates.Conversation | None = None  # LLaVA's, where it stands in for its own
    original: Original | None = None  # where it is in LLaVA's original format
    # Tokenizers raise "Already borrowed" when one thread sets padding while another encodes.
    encoding: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, request: GenerateRequest) -> list[int]:
        """The prompt, one id for each image, and the tokens to go on from behind it.

        Raises:
            InvalidRequest, Unsupported: the request is no prompt for this model.
        """
        prompt = render(request, image_token=self.image_token, apply_template=self.apply_template)
        with self.encoding:
            ids = self._ids(prompt)
        if not ids:
            raise InvalidRequest("The prompt is empty.")
        check_resumable(
            request.resume_token_ids,
            vocab_size=self.vocab_size,
            image_token_id=self.image_token_id,
        )
        return [*ids, *request.resume_token_ids]

    def count_tokens(self, text: str) -> int:
        """The tokens of a ready prompt."""
        with self.encoding:
            return count_tokens(text, tokenizer=self.tokenizer, image_tokens=self.image_tokens)

    def write(self, turns: Sequence[ChatMessage]) -> str:
        """The prompt that is read as ``turns``; raises as ``Engine.write`` does."""
        with self.encoding:
            return write(
                turns,
                tokenizer=self.tokenizer,
                image_token=self.image_token,
                apply_template=self.apply_template,
            )

    def _ids(self, prompt: PromptText) -> list[int]:
        if self.original is not None:
            return self.original.tokenize(prompt.text)
        # LLaVA's templates leave the first token to the tokenizer.
        special = prompt.add_special_tokens or self.conversation is not None
        ids: list[int] = self.tokenizer(prompt.text, add_special_tokens=special)["input_ids"]
        return ids

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends every answer, as a template of LLaVA's says."""
        return () if self.conversation is None else self.conversation.stops

    def spell(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` as an answer shows it."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def load(
    path: str, *, trust_remote_code: bool, conv_template: str | None = None, name: str = ""
) -> Checkpoint:
    """Load the tokenizer and the processor at ``path``; blocking, seconds of imports.

    ``conv_template`` is the conversation to use instead of the checkpoint's own; the model's
    ``name`` tells the one of a LLaVA checkpoint that does not.

    Raises:
        EngineFailed: they are not there or cannot be read.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return _load(path, trust_remote_code, conv_template, name)
    except EngineFailed:
        raise
    except Exception as exc:
        line = next(iter(str(exc).splitlines()), "")
        raise EngineFailed(
            f"The tokenizer or processor of {path} cannot be loaded: {type(exc).__name__}: {line}",
            remedy="Give --model-path a directory, or the id of a model on the Hugging Face hub.",
        ) from exc


def is_original(path: str) -> bool:
    """Whether ``path``, a directory or a hub id, is in LLaVA's original format; blocking.

    Raises:
        EngineFailed: its configuration cannot be read.
    """
    from workers import files
    from workers.llava import config

    return config.is_original(files.config_of(path))


def _load(path: str, trust: bool, conv_template: str | None, name: str) -> Checkpoint:
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    if is_original(path):
        return _load_original(path, conv_template, name)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    text_config = config.get_text_config()
    processor: Any = None
    if hasattr(config, "vision_config"):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        tokenizer = processor.tokenizer
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    image_token: str | None = getattr(processor, "image_token", None)
    apply_template = template_of(processor, tokenizer)
    conversation = templates.choose(
        conv_template, trained_with=None, guess=None, brings_one=apply_template is not None
    )
    if conversation is not None:
        apply_template = templates.renderer(conversation, tokenizer)
    return Checkpoint(
        tokenizer=tokenizer,
        apply_template=apply_template,
        image_token=image_token,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token) if image_token else None,
        image_tokens=_image_tokens(processor) if image_token else 0,
        eos_ids=_eos_ids(path, text_config, tokenizer),
        vocab_size=text_config.vocab_size,
        precision=str(config.dtype).removeprefix("torch."),
        cache_values=cache_values(text_config),
        conversation=conversation,
    )


def _load_original(path: str, conv_template: str | None, name: str) -> Checkpoint:
    """A checkpoint in LLaVA's original format."""
    from workers.llava.text import IMAGE_TOKEN, conversation
    from workers.sglang import original

    found = original.read(path)
    tokenizer = found.tokenize.tokenizer
    apply_template = template_of(tokenizer)
    chosen = templates.choose(
        conv_template,
        trained_with=conversation(found.settings, tokenizer),
        guess=templates.for_model(name),
        brings_one=apply_template is not None,
    )
    if chosen is not None:
        apply_template = templates.renderer(chosen, tokenizer)
    return Checkpoint(
        tokenizer=tokenizer,
        apply_template=apply_template,
        image_token=IMAGE_TOKEN,
        image_token_id=found.tokenize.image_token_id,
        image_tokens=found.config.image_seq_length,
        eos_ids=_eos_ids(str(found.folder), found.settings.text, tokenizer),
        vocab_size=found.settings.text.vocab_size,
        precision=found.settings.dtype,
        cache_values=cache_values(found.settings.text),
        conversation=chosen,
        original=found,
    )


def cache_values(text_config: Any) -> int:
    """Keys and values of one token in all layers; 0 for a model that keeps something else."""
    layers = getattr(text_config, "num_hidden_layers", None)
    heads = getattr(text_config, "num_attention_heads", None)
    width = getattr(text_config, "hidden_size", None)
    if not layers or not heads or not width or getattr(text_config, "kv_lora_rank", None):
        return 0
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    head_width = getattr(text_config, "head_dim", None) or width // heads
    return int(2 * layers * kv_heads * head_width)


def _image_tokens(processor: Any) -> int:
    """Those of a picture of 336 x 336 pixels, LLaVA-1.5's size."""
    picture = Image.new("RGB", (336, 336), "gray")
    try:
        batch = processor(
            text=processor.image_token,
            images=pictures_for(processor, [picture]),
            return_tensors="pt",
        )
    except ValueError:  # it wants more than a placeholder; and this is only for estimates
        return LLAVA_IMAGE_TOKENS
    ids: list[int] = batch["input_ids"].flatten().tolist()
    return ids.count(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def _eos_ids(path: str, text_config: Any, tokenizer: Any) -> frozenset[int]:
    from transformers import GenerationConfig

    sources = [text_config, tokenizer]
    with suppress(OSError):  # a checkpoint need not have one
        sources.append(GenerationConfig.from_pretrained(path))
    return eos_ids(*sources)
