"""Distinct requests of all sorts, drawn from a seed: what mixes are made of."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from protocol.messages import GenerateRequest, WorkerStatus

SIZES = ((112, 112), (336, 336), (640, 360), (90, 300), (33, 17))
COLORS = ("red", "green", "blue", "orange", "purple", "black")
TEXTS = (
    "What is Tandem?",
    "What does upstream_lost mean?",
    "What does context_overflow mean?",
    "What is a lease?",
    "What does the controller do?",
    "Which worker decodes requests in threads?",
    "Count from 1 to 12.",
    "Count from 1 to 40.",
    "Count from 5 to 30.",
    "My name is Ada. What is my name?",
)
ABOUT_PICTURES = (
    "What is this?",
    "What do you see?",
    "What color is it?",
    "How many shapes are there?",
    "What color is the background?",
    "Is there a red circle?",
    "Count from 1 to 25.",
)
REGEXES = (r"[0-9]{3}-[0-9]{4}", r"(yes|no), (red|green|blue)( and (big|small))?\.", r"[a-z]{5,12}")
SCHEMAS = (
    {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}},
        "required": ["color", "count"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
)


@dataclass(frozen=True, slots=True)
class Case:
    """A request and the word for its sort."""

    sort: str
    request: GenerateRequest


def drawn_picture(number: int, size: tuple[int, int]) -> str:
    """A PNG in base64: a shape whose form, color and place follow from ``number``."""
    width, height = size
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    color = COLORS[number % len(COLORS)]
    left, top = (number * 7 % 5) * width // 10, (number * 3 % 5) * height // 10
    box = (left, top, left + width // 2, top + height // 2)
    (pen.ellipse if number % 2 else pen.rectangle)(box, fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def cases(status: WorkerStatus, adapters: Sequence[str], seed: int) -> list[Case]:
    """Some sixty requests, without those that the worker of ``status`` cannot serve."""
    rng = random.Random(seed)
    drawn = (
        Case(sort, GenerateRequest.model_validate({"model": status.model_names[0], **fields}))
        for sort, fields in _fields(rng, adapters, status.context_length or 4096)
    )
    return [case for case in drawn if not status.capabilities.missing(case.request.needs)]


def _fields(
    rng: random.Random, adapters: Sequence[str], context_tokens: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    greedy = {"temperature": 0}
    for text in TEXTS:
        yield "greedy", _chat(rng, text) | greedy
    for number, question in enumerate(ABOUT_PICTURES):
        yield "picture", _chat(rng, question, number) | greedy
    yield "two pictures", _chat(rng, "What do you see?", 8, 9) | greedy
    for number in range(14):
        yield "sampled", _any(rng, number) | _sampling(rng)
    for stop in ("10", "is", "e", " an"):
        yield "stop", _chat(rng, rng.choice(TEXTS)) | greedy | {"stop": [stop, "\n\n"]}
    yield "stop", _chat(rng, TEXTS[0]) | _sampling(rng) | {"stop": "the"}
    for regex in REGEXES:
        yield "regex", _chat(rng, rng.choice(TEXTS)) | greedy | {"regex": regex}
        yield "regex", _any(rng, 1) | _sampling(rng) | {"regex": regex}
    for schema in map(json.dumps, SCHEMAS):
        yield "schema", _chat(rng, "What do you see?", 10) | greedy | {"json_schema": schema}
        yield "schema", _any(rng, 0) | _sampling(rng) | {"json_schema": schema}
    for adapter in adapters:
        for number in range(4):
            how = greedy if number < 3 else _sampling(rng)
            yield f"adapter {adapter}", _any(rng, number) | how | {"adapter": adapter}
    for number in range(4):
        how = greedy if number < 2 else _sampling(rng)
        yield "logprobs", _any(rng, number) | how | {"logprobs": number}
    yield "too long", {"prompt": "one two " * context_tokens}
    yield "no picture", {"prompt": "<image>What is this?", "images": ["AAAA"]}


def _any(rng: random.Random, number: int) -> dict[str, Any]:
    """A question with a picture, if ``number`` is odd, or without."""
    if number % 2:
        return _chat(rng, rng.choice(ABOUT_PICTURES), rng.randrange(100))
    return _chat(rng, rng.choice(TEXTS))


def _chat(rng: random.Random, text: str, *pictures: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>" * len(pictures) + text}]
    if rng.random() < 0.2:
        before = ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."})
        turns = [*before, *turns]
    return {
        "messages": turns,
        "images": [drawn_picture(number, rng.choice(SIZES)) for number in pictures],
        "max_new_tokens": rng.randint(6, 64),
    }


def _sampling(rng: random.Random) -> dict[str, Any]:
    return {
        "temperature": round(rng.uniform(0.2, 1.6), 3),
        "top_p": rng.choice((1.0, round(rng.uniform(0.5, 0.99), 3))),
        "top_k": rng.choice((0, 0, 3, 40)),
        "min_p": rng.choice((0.0, 0.0, 0.02, 0.1)),
        "repetition_penalty": rng.choice((1.0, 1.0, 1.1, 1.3)),
        "seed": rng.getrandbits(62),
    }
