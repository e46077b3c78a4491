"""Text as LLaVA tokenizes it, with an id behind the vocabulary for each picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from protocol.errors import EngineFailed
from workers import files
from workers.llava.config import Settings

IMAGE_TOKEN = "<image>"
IMAGE_MARKS = ("<im_start>", "<im_end>")

_PATCH_TOKEN = "<im_patch>"


class Tokenization:
    """Text to ids, one for each picture; safe to use from several threads."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.tokenizer = tokenizer
        # The first id that neither the network nor the tokenizer has: no text can hold it, and no
        # answer, for the head keeps its size.
        self.image_token_id: int = max(settings.text.vocab_size, len(tokenizer))
        self._image_marks = settings.image_marks
        self._begin: str = tokenizer.bos_token or ""
        # How many tokens the tokenizer puts before a text.
        self._prefix = int(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])

    def __call__(self, text: str) -> list[int]:
        """The ids of ``text``, ``image_token_id`` for each ``<image>`` in it.

        Each chunk between pictures is tokenized for itself, as in LLaVA's training. One
        beginning-of-sequence token is there whether ``text`` holds it or not: LLaVA's templates
        write none and its models expect it.
        """
        if self._image_marks:
            text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(IMAGE_MARKS))
        first, *others = text.split(IMAGE_TOKEN)
        begun = bool(self._begin) and first.startswith(self._begin)
        ids: list[int] = self.tokenizer(first, add_special_tokens=not begun).input_ids
        for chunk in others:
            ids = [*ids, self.image_token_id, *self.tokenizer(chunk).input_ids[self._prefix :]]
        return ids


def load_tokenizer(folder: Path, settings: Settings) -> Any:
    """The tokenizer of ``folder``, with the marks around a picture if the model knows them.

    Raises:
        EngineFailed: a package to read it is missing, or the model was trained with the marks
            and has no embedding for them.
    """
    file = folder / "tokenizer_config.json"
    said = files.read_json(file) if file.is_file() else {}
    how = {}
    if (folder / "tokenizer.model").is_file():
        if not ((folder / "tokenizer.json").is_file() or _reads_sentencepiece()):
            raise EngineFailed(
                f"The tokenizer of {folder} is SentencePiece's, which cannot be read.",
                remedy="pip install sentencepiece protobuf",
            )
        # What such a tokenizer did before there were options; transformers' defaults changed.
        how = {name: True for name in ("legacy", "add_bos_token") if name not in said}
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    if settings.image_marks:
        patch = [_PATCH_TOKEN] if settings.patch_token else []
        tokenizer.add_tokens([*patch, *IMAGE_MARKS], special_tokens=True)
        if max(tokenizer.convert_tokens_to_ids(list(IMAGE_MARKS))) >= settings.text.vocab_size:
            raise EngineFailed(
                f"mm_use_im_start_end is set, but the vocabulary of {folder} has no "
                f"{' and '.join(IMAGE_MARKS)}.",
                remedy="Give the config.json and the tokenizer it was trained with.",
            )
    return tokenizer


def _reads_sentencepiece() -> bool:
    return bool(is_sentencepiece_available() and is_protobuf_available())


def conversation(settings: Settings, tokenizer: Any) -> str | None:
    """The template whose end of an answer is the tokenizer's, unless it brings one for pictures.

    LLaVA's releases still carry their language model's own template, which knows no pictures.
    """
    if "image" in str(tokenizer.chat_template or ""):
        return None
    if tokenizer.eos_token == "<|im_end|>":
        return "chatml_direct"
    if tokenizer.eos_token != "</s>":
        return None
    if settings.model_type == "llava_mistral":
        return "mistral_instruct"
    # Before version 1.5, which brought the deeper projector, only the name tells.
    return None if settings.projector == "linear" else "llava_v1"
