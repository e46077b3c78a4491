"""Run one of LLaVA's modules as it is: ``python run_llava.py llava.serve.controller ARGS...``.

LLaVA's package imports models written for transformers of 2023. Only the package is replaced here,
and in ``llava.model.builder`` the function that loads a model: by one that loads a stand-in.
"""

import importlib.util
import runpy
import sys
import types

REPLY = "The picture shows a red circle. It is round."


class Tokenizer:
    """A token is a byte; 257 begins a text."""

    bos_token_id = 257

    def __call__(self, text):
        return types.SimpleNamespace(input_ids=[257, *text.encode()])

    def decode(self, ids, **_):
        return bytes(int(token) for token in ids if int(token) < 256).decode("utf-8", "replace")

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


class Model:
    """Says ``REPLY`` token by token, as LLaVA's model would: until a stop string or the limit."""

    def __init__(self):
        self.device = "cpu"
        self.config = types.SimpleNamespace(max_position_embeddings=2048)

    def get_vision_tower(self):
        return types.SimpleNamespace(num_patches=4)

    def generate(self, inputs, streamer, stopping_criteria, max_new_tokens, images=None, **_):
        import torch

        streamer.put(inputs[0])
        reply = REPLY if images is None else f"{len(images)} seen. {REPLY}"
        for token in reply.encode()[:max_new_tokens]:
            inputs = torch.cat([inputs, torch.tensor([[token]])], dim=1)
            streamer.put(torch.tensor([token]))
            if any(criterion(inputs, None) for criterion in stopping_criteria):
                break
        streamer.end()


def image_processor(images, return_tensors):
    import torch

    return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}


def load_pretrained_model(*_, **__):
    return Tokenizer(), Model(), image_processor, 2048


def main():
    spec = importlib.util.find_spec("llava")
    for name in ("llava", "llava.model"):
        package = types.ModuleType(name)
        package.__path__ = [] if name == "llava.model" else list(spec.submodule_search_locations)
        sys.modules[name] = package
    builder = types.ModuleType("llava.model.builder")
    builder.load_pretrained_model = load_pretrained_model
    sys.modules["llava.model.builder"] = builder
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
