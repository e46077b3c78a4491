"""The embedded checkpoint and its adapters, as files that anybody's tools can read."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.processes import ROOT
from workers.settings import EMBEDDED_MODEL

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

ADAPTERS = sorted(
    config.parent for config in (EMBEDDED_MODEL.parent / "adapters").glob("*/adapter_config.json")
)
pytestmark = pytest.mark.timeout(60)  # transformers is slow to import


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.AutoProcessor.from_pretrained(EMBEDDED_MODEL)


def test_it_is_small_and_in_bfloat16() -> None:
    weights = EMBEDDED_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    with safetensors.safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_its_architecture() -> None:
    config = transformers.AutoConfig.from_pretrained(EMBEDDED_MODEL)
    assert config.architectures == ["LlavaForConditionalGeneration"]
    assert config.vision_config.model_type == "clip_vision_model"
    text = config.text_config
    assert text.model_type == "llama"
    assert text.head_dim == 64
    assert text.num_key_value_heads < text.num_attention_heads
    assert text.max_position_embeddings >= 4096


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_every_text_survives_the_tokenizer(processor: Any, text: str) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text


def test_a_number_is_one_token(processor: Any) -> None:
    for number in range(1, 121):
        for text in (str(number), f" {number}"):
            assert len(processor.tokenizer.encode(text, add_special_tokens=False)) == 1, text


def test_its_chat_template(processor: Any) -> None:
    def parts(*texts: str) -> list[dict[str, str]]:
        return [
            {"type": "image"} if text == "<image>" else {"type": "text", "text": text}
            for text in texts
        ]

    text = processor.apply_chat_template(
        [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": parts("Which is red?", "<image>", "<image>")},
            {"role": "assistant", "content": "The first."},
            {"role": "user", "content": parts("<image>", " And this? ")},
        ],
        add_generation_prompt=True,
    )
    assert text == (
        "<s><|system|>Be exact.<|user|><image><image>Which is red?<|assistant|>The first.</s>"
        "<|user|><image>And this?<|assistant|>"
    )


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: path.name)
def test_an_adapter_is_small_and_touches_the_language_model_alone(adapter: Any) -> None:
    assert (adapter / "adapter_model.safetensors").stat().st_size <= 300_000
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] <= 8
    assert config["base_model_name_or_path"] == "pocket-llava"
    with safetensors.safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert all(re.search(r"language_model.*lora_[AB]", name) for name in file.keys())  # noqa: SIM118


def test_there_are_two_adapters() -> None:
    assert [adapter.name for adapter in ADAPTERS] == ["formal", "terse"]


def test_nothing_of_the_training_machine_is_in_the_files() -> None:
    places = {str(ROOT), str(Path.home()), tempfile.gettempdir()}
    for file in [*EMBEDDED_MODEL.glob("*.json"), *EMBEDDED_MODEL.parent.glob("adapters/*/*.json")]:
        assert not any(place in file.read_text() for place in places), file


def test_the_model_card_is_filled_in() -> None:
    card = (EMBEDDED_MODEL / "README.md").read_text()
    assert "@@" not in card
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card):
        assert (EMBEDDED_MODEL / picture).is_file(), picture
    size = (EMBEDDED_MODEL / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in card
