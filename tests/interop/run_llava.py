"""Run one of LLaVA's modules as it is: ``python run_llava.py llava.serve.controller ARGS...``.

LLaVA's package imports models written for transformers of 2023. Only the package is replaced here,
and in ``llava.model.builder`` the function that loads a model: by one that loads a stand-in.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any

REPLY = "The picture shows a red circle. It is round."


class Tokenizer:
    """A token is a byte; 257 begins a text."""

    bos_token_id = 257

    def __call__(self, text: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(input_ids=[257, *text.encode()])

    def decode(self, ids: Iterable[Any], **_: object) -> str:
        return bytes(int(token) for token in ids if int(token) < 256).decode("utf-8", "replace")

    def batch_decode(self, rows: Iterable[Any], **_: object) -> list[str]:
        return [self.decode(row) for row in rows]


class Model:
    """Says ``REPLY`` token by token, as LLaVA's model would: until a stop string or the limit."""

    def __init__(self) -> None:
        self.device = "cpu"
        self.config = types.SimpleNamespace(max_position_embeddings=2048)

    def get_vision_tower(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(num_patches=4)

    def generate(
        self,
        inputs: Any,
        streamer: Any,
        stopping_criteria: Sequence[Any],
        max_new_tokens: int,
        images: Any = None,
        **_: object,
    ) -> None:
        import torch

        streamer.put(inputs[0])
        reply = REPLY if images is None else f"{len(images)} seen. {REPLY}"
        for token in reply.encode()[:max_new_tokens]:
            inputs = torch.cat([inputs, torch.tensor([[token]])], dim=1)
            streamer.put(torch.tensor([token]))
            if any(criterion(inputs, None) for criterion in stopping_criteria):
                break
        streamer.end()


def image_processor(images: Sequence[Any], return_tensors: str) -> dict[str, Any]:
    import torch

    return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}


def load_pretrained_model(*_: object, **__: object) -> tuple[object, ...]:
    return Tokenizer(), Model(), image_processor, 2048


def main() -> None:
    spec = importlib.util.find_spec("llava")
    assert spec is not None
    for name, places in (("llava", spec.submodule_search_locations or []), ("llava.model", [])):
        package = types.ModuleType(name)
        package.__path__ = list(places)
        sys.modules[name] = package
    builder = types.ModuleType("llava.model.builder")
    vars(builder)["load_pretrained_model"] = load_pretrained_model
    sys.modules["llava.model.builder"] = builder
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
