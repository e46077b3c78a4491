"""From text and pictures to the inputs of the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from protocol.errors import InvalidRequest
from workers.llava.images import Preparation, Tiles
from workers.llava.text import IMAGE_TOKEN, Tokenization

if TYPE_CHECKING:
    from workers.hf.model import Inputs


class Encoding:
    """Text and pictures to ``Inputs``; an ``Encode``."""

    def __init__(self, tokenize: Tokenization, prepare: Preparation) -> None:
        self._tokenize = tokenize
        self._prepare = prepare

    def __call__(
        self, text: str, add_special_tokens: bool, pictures: Sequence[Image.Image]
    ) -> Inputs:
        """``input_ids`` and ``attention_mask`` [1, tokens], and what pictures become.

        One beginning-of-sequence token is there whatever ``add_special_tokens`` says.

        Raises:
            InvalidRequest: there is not one ``<image>`` in ``text`` for each picture.
        """
        found = text.count(IMAGE_TOKEN)
        if found != len(pictures):
            raise InvalidRequest(
                f"The text holds {found} {IMAGE_TOKEN} for {len(pictures)} images.",
                remedy=f"Write one {IMAGE_TOKEN} for each image.",
            )
        tiles = self._prepare(pictures) if pictures else Tiles({}, [])
        lengths = iter(tiles.lengths)
        ids: list[int] = []
        for token_id in self._tokenize(text):
            is_picture = token_id == self._tokenize.image_token_id
            ids += [token_id] * (next(lengths) if is_picture else 1)
        return {
            "input_ids": torch.tensor([ids], dtype=torch.long),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            **tiles.tensors,
        }
