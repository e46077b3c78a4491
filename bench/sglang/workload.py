"""Requests that share a picture and a conversation of some 400 tokens, and differ after it."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import orjson

from bench.client import body_of
from bench.processes import ROOT
from models.pocket import exam, scenes
from protocol.messages import GenerateRequest

EMBEDDED = ROOT / "models" / "pocket-llava"
SHARED_TOKENS = 400
LAST = "Count from 1 to 100."  # 101 tokens of the embedded model


@dataclass(frozen=True, slots=True)
class Ask:
    """One request in two spellings."""

    worker: bytes  # for a worker's route
    direct: bytes  # for SGLang's own /generate


class Workload:
    """Greedy requests for ``tokens`` tokens, no two of them equal.

    The chat template is applied here, so that both spellings hold the same prompt.

    Args:
        checkpoint: a directory; its tokenizer and chat template are used.
    """

    def __init__(self, model: str, checkpoint: Path, *, tokens: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(checkpoint))
        self._model = model
        self._tokens = tokens
        self._numbers = itertools.count(10_000)
        drawn = Random("picture")
        scene = scenes.random_scene(drawn, count=1)
        picture = scenes.draw(scene, drawn, (336, 336))
        self._picture = base64.b64encode(scenes.png(picture)).decode()
        self._shared = self._conversation()
        self.facts = {"max_new_tokens": tokens, "shared_text_tokens": self._count(self._shared)}

    def take(self, number: int) -> list[Ask]:
        return [self._ask(next(self._numbers)) for _ in range(number)]

    def _ask(self, number: int) -> Ask:
        turns = [*self._shared, _user(f"My number is {number}."), _assistant("I see."), _user(LAST)]
        prompt = self._rendered(turns)
        request = GenerateRequest.model_validate(
            {
                "model": self._model,
                "prompt": prompt,
                "images": [self._picture],
                "temperature": 0,
                "max_new_tokens": self._tokens,
            }
        )
        sampling = {"temperature": 0, "max_new_tokens": self._tokens}
        direct = {"text": prompt, "image_data": self._picture, "sampling_params": sampling}
        return Ask(worker=body_of(request), direct=orjson.dumps({**direct, "stream": True}))

    def _conversation(self) -> list[dict[str, str]]:
        """A picture, and what people ask about Tandem, until it is long enough."""
        turns = [_user("<image>What is this?"), _assistant("This is a picture.")]
        for item in _talk():
            turns += [_user(item.messages[-1].text), _assistant(item.answer)]
            if self._count(turns) >= SHARED_TOKENS:
                return turns
        raise AssertionError("the exam has thousands of questions")

    def _count(self, turns: list[dict[str, str]]) -> int:
        """Tokens, with one for the picture."""
        return len(self._tokenizer(self._rendered(turns))["input_ids"])

    def _rendered(self, turns: list[dict[str, str]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [_as_parts(turn) for turn in turns], tokenize=False, add_generation_prompt=True
        )
        return text


def _talk() -> Iterator[exam.Item]:
    section = next(s for s in exam.SECTIONS if s.name == "facts, phrasings of the training")
    return exam.items(section, 400)


def _as_parts(turn: dict[str, str]) -> dict[str, Any]:
    before, mark, text = turn["content"].rpartition("<image>")
    images = [{"type": "image"}] * (1 if mark else 0)
    return {"role": turn["role"], "content": [*images, {"type": "text", "text": before + text}]}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
