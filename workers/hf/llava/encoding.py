"""From text and pictures to the inputs of the network, as LLaVA tokenizes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from protocol.errors import InvalidRequest
from workers.hf.llava.images import Preparation, Tiles

if TYPE_CHECKING:
    from workers.hf.model import Inputs

IMAGE_TOKEN = "<image>"
IMAGE_MARKS = ("<im_start>", "<im_end>")


class Encoding:
    """Text and pictures to ``Inputs``; an ``Encode``."""

    def __init__(
        self, tokenizer: Any, prepare: Preparation, *, image_token_id: int, image_marks: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._prepare = prepare
        self._image_token_id = image_token_id
        self._image_marks = image_marks
        self._begin: str = tokenizer.bos_token or ""
        # How many tokens the tokenizer puts before a text.
        self._prefix = int(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])

    def __call__(
        self, text: str, add_special_tokens: bool, pictures: Sequence[Image.Image]
    ) -> Inputs:
        """``input_ids`` and ``attention_mask`` [1, tokens], and what pictures become.

        One beginning-of-sequence token is there whatever ``add_special_tokens`` says: LLaVA's
        templates write none and its models expect it.

        Raises:
            InvalidRequest: there is not one ``<image>`` in ``text`` for each picture.
        """
        found = text.count(IMAGE_TOKEN)
        if found != len(pictures):
            raise InvalidRequest(
                f"The text holds {found} {IMAGE_TOKEN} for {len(pictures)} images.",
                remedy=f"Write one {IMAGE_TOKEN} for each image.",
            )
        if self._image_marks:
            text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(IMAGE_MARKS))
        tiles = self._prepare(pictures) if pictures else Tiles({}, [])
        ids = self._ids(text, tiles.lengths)
        return {
            "input_ids": torch.tensor([ids], dtype=torch.long),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            **tiles.tensors,
        }

    def _ids(self, text: str, lengths: Sequence[int]) -> list[int]:
        """Each chunk between pictures is tokenized for itself, as in LLaVA's training."""
        first, *others = text.split(IMAGE_TOKEN)
        begun = bool(self._begin) and first.startswith(self._begin)
        ids: list[int] = self._tokenizer(first, add_special_tokens=not begun).input_ids
        for length, chunk in zip(lengths, others, strict=True):
            ids += [self._image_token_id] * length
            ids += self._tokenizer(chunk).input_ids[self._prefix :]
        return ids
