"""Pictures with known content, and questions about them whose answers are known."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from PIL import Image

from models.pocket.exam import SECTIONS, Item, items
from models.pocket.scenes import COLORS, Scene, Thing, draw


def picture(shape: str = "circle", color: str = "red", size: int = 112) -> Image.Image:
    """One shape of the embedded model's world in the middle of a white picture."""
    assert color in COLORS, color
    scene = Scene("white", (Thing(shape, color, x=0.5, y=0.5, radius=0.25),))
    return draw(scene, Random(0), (size, size))


def encoded(image: Image.Image, image_format: str = "PNG") -> str:
    """The file of ``image`` in base64, as requests carry it."""
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Puzzle:
    """A conversation whose right answer is known, as fields of a request.

    ``fact`` is the word or words that any right answer holds; ``answer`` is the whole of it.
    """

    section: str
    fields: dict[str, Any]
    answer: str
    fact: str


def puzzles(number: int, *sections: str, seed: int = 7) -> list[Puzzle]:
    """``number`` puzzles, the ``sections`` of the exam in turn (all, if none is named)."""
    chosen = [section for section in SECTIONS if not sections or section.name in sections]
    assert len(chosen) == len(sections) or not sections, sections
    each = -(-number // len(chosen))
    drawn = [
        [_puzzle(section.name, item) for item in islice(items(section, each, seed), each)]
        for section in chosen
    ]
    return [puzzle for row in zip(*drawn, strict=True) for puzzle in row][:number]


def _puzzle(section: str, item: Item) -> Puzzle:
    fields = {
        "messages": [
            {"role": m.role, "content": "<image>" * len(m.pictures) + m.text} for m in item.messages
        ],
        "images": [encoded(picture) for m in item.messages for picture in m.pictures],
    }
    return Puzzle(section, fields, item.answer, item.fact)
