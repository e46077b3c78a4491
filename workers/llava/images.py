"""Pictures as LLaVA prepares them for its vision tower, to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from protocol.errors import EngineFailed
from workers.llava.config import Settings

SQUARE_SIDE = 8192
"""Pixels; a picture whose square would be wider is scaled down first."""

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Pictures as the network takes them."""

    tensors: dict[str, torch.Tensor]
    lengths: list[int]  # placeholders for each picture


class Preparation:
    """How one checkpoint's pictures become tiles."""

    def __init__(self, settings: Settings, config: Any, tower: Path) -> None:
        """``config`` is the network's, ``tower`` the directory of its vision tower.

        Raises:
            EngineFailed: the tower does not say what pictures it takes.
        """
        try:
            # The one for torchvision resizes otherwise, and answers differ.
            self._processor = CLIPImageProcessorPil.from_pretrained(tower)
        except OSError as exc:
            raise EngineFailed(
                f"The vision tower {tower} holds no preprocessor_config.json that can be read.",
                remedy="Download it again, complete.",
            ) from exc
        self._padded = settings.padded
        self._resolutions = settings.resolutions
        self._config = config
        size = self._processor.size
        self._overview = size["shortest_edge"] or size["height"]
        self._border = tuple(int(mean * 255) for mean in self._processor.image_mean)

    def __call__(self, pictures: Sequence[Image.Image]) -> Tiles:
        """``pixel_values`` of RGB ``pictures``: [pictures, 3, side, side] float32.

        With several resolutions they are [pictures, tiles, 3, side, side], zeros behind a
        picture's last tile, and ``image_sizes`` [pictures, 2] holds heights and widths.
        """
        if not self._resolutions:
            squares = [self._squared(picture) if self._padded else picture for picture in pictures]
            length = self._config.image_seq_length
            return Tiles({"pixel_values": self._pixels(squares)}, [length] * len(pictures))
        tiles = [self._pixels(self._cut(picture)) for picture in pictures]
        sizes = [[picture.height, picture.width] for picture in pictures]
        return Tiles(
            {
                "pixel_values": torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True),
                "image_sizes": torch.tensor(sizes),
            },
            [self._length(size) for size in sizes],
        )

    def _pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        pixels: torch.Tensor = self._processor(list(pictures), return_tensors="pt")["pixel_values"]
        return pixels

    def _squared(self, picture: Image.Image) -> Image.Image:
        if max(picture.size) > SQUARE_SIDE:
            picture = picture.copy()
            picture.thumbnail((SQUARE_SIDE, SQUARE_SIDE))
        side = max(picture.size)
        return _centered(picture, (side, side), self._border)

    def _cut(self, picture: Image.Image) -> list[Image.Image]:
        """The whole picture in one tile, then its parts row by row."""
        resolution = best_resolution(picture.size, self._resolutions)
        scaled = _centered(picture.resize(_fitted(picture.size, resolution)), resolution, (0, 0, 0))
        side = self._processor.crop_size["height"]
        width, height = resolution
        parts = [
            scaled.crop((left, top, left + side, top + side))
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]
        return [picture.resize((self._overview, self._overview)), *parts]

    def _length(self, size: list[int]) -> int:
        """Features of a picture of this height and width once the network has packed them.

        A row of tiles has its borders cut away and ends in one more feature.
        """
        tower = self._config.vision_config
        side = tower.image_size // tower.patch_size
        rows, columns = get_anyres_image_grid_shape(
            size, self._config.image_grid_pinpoints, tower.image_size
        )
        _, height, width = unpad_image(torch.empty(1, rows * side, columns * side), size).shape
        return int(self._config.image_seq_length) + height * (width + 1)


def best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The one that keeps most of a picture's pixels, of those the one with the least border."""

    def merit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def _fitted(size: Size, into: Size) -> Size:
    """The largest size of the same proportions, rounded up as LLaVA does."""
    (width, height), (wide, high) = size, into
    if wide / width < high / height:
        return wide, min(math.ceil(height * (wide / width)), high)
    return min(math.ceil(width * (high / height)), wide), high


def _centered(picture: Image.Image, size: Size, border: tuple[int, ...]) -> Image.Image:
    if picture.size == size:
        return picture
    canvas = Image.new("RGB", size, border)
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas
