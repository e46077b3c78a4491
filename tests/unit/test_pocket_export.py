"""The model in LLaVA's original format computes what the llava-hf checkpoint computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import picture
from tests.processes import ROOT
from workers.settings import EMBEDDED_MODEL

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.timeout(120)
QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "llava-pocket"
    subprocess.run(
        [sys.executable, "models/pocket-llava/export.py", str(folder)], cwd=ROOT, check=True
    )
    return folder


def test_it_looks_like_llava(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert Path(config["mm_vision_tower"]).is_dir()
    assert "vision_config" not in config


def test_the_same_logits(exported: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        EMBEDDED_MODEL, dtype=torch.float32
    )
    turn = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=picture(), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        expected = reference(**inputs).logits[0, -1]
        found = as_llava_computes(exported, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def as_llava_computes(folder: Path, prompt: str) -> Any:
    """LLaVA's forward pass, written out: tower, projector, features in place of the image."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = {
        name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()
    }
    tower = transformers.CLIPVisionModel.from_pretrained(
        config["mm_vision_tower"], dtype=torch.float32
    )
    images = transformers.AutoImageProcessor.from_pretrained(config["mm_vision_tower"])
    pixels = images(picture(), return_tensors="pt")["pixel_values"]
    states = tower(pixels, output_hidden_states=True).hidden_states
    features = states[config["mm_vision_select_layer"]][:, 1:]
    for layer in ("0", "2"):
        name = f"model.mm_projector.{layer}"
        features = torch.nn.functional.linear(
            features, weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias")
        )
        if layer == "0":
            features = torch.nn.functional.gelu(features)
    language = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{key: value for key, value in config.items() if not key.startswith("mm_")}
        )
    ).eval()
    missing, unexpected = language.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before, after = (
        torch.tensor([tokenizer.encode(part, add_special_tokens=False)])
        for part in prompt.split("<image>")
    )
    embed = language.get_input_embeddings()
    embedded = torch.cat([embed(before), features, embed(after)], dim=1)
    return language(inputs_embeds=embedded).logits[0, -1]
