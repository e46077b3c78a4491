"""workers.hf.quantization: the language model in few bits, all of it and nothing else.

pytest tests/unit/test_hf_quantization.py
"""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import EngineFailed
from tests.pictures import picture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from transformers import (  # noqa: E402 - after the skip
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402

from workers.hf import quantization  # noqa: E402
from workers.hf.quantization import Bits  # noqa: E402

CPU = torch.device("cpu")
POCKET = str(Path(__file__).parents[2] / "models" / "pocket-llava")

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
QWEN = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
EYES: dict[str, Any] = {"hidden_size": 64, "depth": 1, "num_heads": 2, "intermediate_size": 128}


def clip() -> Any:
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=64,
    )


def seeing() -> dict[str, Any]:
    return {"vision_config": clip(), "text_config": LlamaConfig(**TEXT), "image_token_index": 5}


def tiny(name: str) -> Any:
    """A config of that architecture; all shapes, those of the vision tower too, suit NF4."""
    return {
        "llama": lambda: LlamaConfig(**TEXT),
        "qwen2": lambda: Qwen2Config(**TEXT, tie_word_embeddings=True),
        "llava": lambda: LlavaConfig(**seeing()),
        "llava_next": lambda: LlavaNextConfig(**seeing()),
        "qwen2_vl": lambda: Qwen2VLConfig(
            text_config=QWEN,
            vision_config={"embed_dim": 64, "hidden_size": 64, "depth": 1, "num_heads": 2},
        ),
        "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
            text_config=QWEN, vision_config=EYES | {"out_hidden_size": 64}
        ),
        "qwen3_vl": lambda: Qwen3VLConfig(
            text_config=QWEN | {"head_dim": 32},
            vision_config=EYES
            | {
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        ),
    }[name]()


def auto_class(config: Any) -> Any:
    text_only = config is config.get_text_config()
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """Write random weights of a config; returns what ``from_pretrained`` takes."""

    def write(config: Any) -> str:
        torch.manual_seed(0)
        auto_class(config).from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def load(path: str, bits: Bits, dtype: Any = torch.bfloat16) -> Any:
    config = AutoConfig.from_pretrained(path)
    factory = auto_class(config)
    asked = quantization.config_for(bits, factory, config, device=CPU, dtype=dtype)
    return factory.from_pretrained(
        path, config=config, dtype=dtype, quantization_config=asked, device_map={"": "cpu"}
    )


def quantized(network: Any) -> set[str]:
    kinds = ("Params4bit", "Int8Params")
    return {n for n, w in network.named_parameters() if type(w).__name__ in kinds}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_all_of_the_language_model_and_nothing_else(stored: Any, name: str, bits: Bits) -> None:
    network = load(stored(tiny(name)), bits)
    quantization.check(network, bits)
    decoder = network.get_decoder()
    linear = {
        f"{name}.weight" for name, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert len(linear) == 14  # 2 layers of 4 + 3
    assert quantized(decoder) == linear
    assert len(quantized(network)) == 14
    network(input_ids=torch.tensor([[1, 2, 3]]))


def test_layers_that_do_not_fit_stay_as_they_are(stored: Any) -> None:
    path = stored(LlamaConfig(**TEXT | {"intermediate_size": 80}))
    four, eight = load(path, 4), load(path, 8)
    assert len(quantized(four)) == 8
    assert not any("mlp" in name for name in quantized(four))
    assert len(quantized(eight)) == 14
    four(input_ids=torch.tensor([[1, 2, 3]]))
    eight(input_ids=torch.tensor([[1, 2, 3]]))


def test_on_an_accelerator_only_blocks_must_fit() -> None:
    config = LlamaConfig(**TEXT | {"intermediate_size": 80})
    asked = quantization.config_for(
        4, LlamaForCausalLM, config, device=torch.device("cuda"), dtype="auto"
    )
    skipped = asked.llm_int8_skip_modules
    assert should_convert_module("model.layers.1.mlp.up_proj", skipped)
    assert not should_convert_module("model.layers.1.mlp.down_proj", skipped)


class Odd(LlamaForCausalLM):  # type: ignore[misc]
    """Names that begin or end like others: ``proj`` beside the decoder, one misfit in layer 1."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.proj = torch.nn.Linear(64, 64)
        self.model.layers[1].mlp.down_proj = torch.nn.Linear(100, 64)
        self.post_init()


def test_a_name_does_not_stand_for_others_like_it() -> None:
    config = LlamaConfig(**TEXT | {"num_hidden_layers": 12})
    skipped = quantization.config_for(4, Odd, config, device=CPU, dtype=torch.float32)
    kept = {
        name
        for name, module in Odd(config).named_modules()
        if isinstance(module, torch.nn.Linear)
        and not should_convert_module(name, skipped.llm_int8_skip_modules)
    }
    assert kept == {"proj", "lm_head", "model.layers.1.mlp.down_proj"}


def test_a_model_with_no_fitting_layer_is_refused() -> None:
    config = LlamaConfig(**TEXT | {"hidden_size": 48, "intermediate_size": 80})
    with pytest.raises(EngineFailed, match="None of the 14 layers") as failure:
        quantization.config_for(4, LlamaForCausalLM, config, device=CPU, dtype=torch.float32)
    assert failure.value.remedy == "Leave --load-4bit out."


@pytest.mark.parametrize(
    ("device", "dtype", "stored_dtype", "computes_in"),
    [
        ("cpu", "bfloat16", "float16", "bfloat16"),
        ("cpu", "float32", "bfloat16", "float32"),
        ("cuda", "auto", "float16", "float16"),
        ("cuda", "auto", "float32", "bfloat16"),
        ("cuda", "auto", None, "bfloat16"),
        ("cuda", "float32", "float16", "bfloat16"),
    ],
)
def test_what_four_bits_compute_in(
    device: str, dtype: str, stored_dtype: str | None, computes_in: str
) -> None:
    asked = quantization.config_for(
        4,
        LlamaForCausalLM,
        LlamaConfig(**TEXT, dtype=stored_dtype),
        device=torch.device(device),
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
    )
    assert asked.bnb_4bit_compute_dtype == getattr(torch, computes_in)


def test_a_model_that_is_not_quantized_is_noticed() -> None:
    with pytest.raises(EngineFailed, match="No layer of the model is in 4 bits"):
        quantization.check(LlamaForCausalLM(LlamaConfig(**TEXT)), 4)


def test_a_quantized_vision_tower_is_noticed(stored: Any) -> None:
    path = stored(tiny("llava"))
    # Names as they were before transformers 5: they match nothing, and nothing says so.
    asked = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["vision_tower", "multi_modal_projector"]
    )
    network = AutoModelForImageTextToText.from_pretrained(
        path, quantization_config=asked, device_map={"": "cpu"}
    )
    with pytest.raises(EngineFailed, match=r"outside the language model .*vision_tower"):
        quantization.check(network, 8)


@pytest.mark.parametrize(
    ("stored_as", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq 4-bit"),
        ({"quant_method": "awq", "w_bit": 4}, "awq 4-bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        (transformers.BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes 8-bit"),
    ],
)
def test_a_checkpoint_quantized_before(stored_as: Any, said: str) -> None:
    text = LlamaConfig(**TEXT, quantization_config=stored_as)
    for config in (text, LlavaConfig(vision_config=clip(), text_config=text)):
        with pytest.raises(EngineFailed, match="quantized already") as failure:
            quantization.refuse_quantized(config, "some/model")
        assert f"some/model are quantized already ({said})" in failure.value.message
    network = LlamaForCausalLM(LlamaConfig(**TEXT))
    network.config.quantization_config = stored_as
    assert quantization.precision(network) == said


def test_a_plain_checkpoint_passes() -> None:
    quantization.refuse_quantized(tiny("llava"), "some/model")
    quantization.prepare(tiny("llava"))


@pytest.mark.parametrize(("bits", "precision"), [(4, "nf4"), (8, "int8")])
def test_bytes_and_precision(stored: Any, bits: Bits, precision: str) -> None:
    path = stored(tiny("qwen2"))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert quantization.precision(plain) == "bfloat16"
    assert quantization.weight_bytes_before(plain) == quantization.weight_bytes(plain)
    network = load(path, bits)
    values = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    for _ in range(2):
        assert quantization.precision(network) == precision
        assert quantization.weight_bytes_before(network) == quantization.weight_bytes(plain)
        saved = quantization.weight_bytes(plain) - quantization.weight_bytes(network)
        # In place of 2 bytes: half a byte or one, and the scales.
        assert 0.8 < saved / (values * (2 - bits / 8)) < 1
        quantization.settle(network)
    quantization.release()


def layout(network: Any) -> dict[str, Any]:
    """Where each weight lies, and whether its scales have been taken out of it."""
    return {
        name: (weight.data_ptr(), getattr(weight, "SCB", None) is None)
        for name, weight in network.named_parameters()
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_once_settled_nothing_moves_and_threads_may_share_it(stored: Any, bits: Bits) -> None:
    network = load(stored(tiny("llama")), bits)
    quantization.settle(network)
    settled = layout(network)

    def logits(token: int) -> Any:
        with torch.inference_mode():
            return network(input_ids=torch.tensor([[token, 7]])).logits

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(logits, range(6)))
    assert layout(network) == settled
    assert all(torch.equal(one, logits(token)) for token, one in enumerate(together))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_embedded_model_still_sees_colours(
    bits: Bits, caplog: pytest.LogCaptureFixture
) -> None:
    network = load(POCKET, bits)
    quantization.settle(network)
    processor = AutoProcessor.from_pretrained(POCKET)
    processor.tokenizer.padding_side = "left"
    things = [("red", "circle"), ("blue", "square"), ("green", "triangle"), ("yellow", "circle")]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": f"<image>What color is the {shape}?"}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for _, shape in things
    ]
    inputs = processor(
        images=[picture(shape, color) for color, shape in things],
        text=prompts,
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ids = network.generate(**inputs, do_sample=False, max_new_tokens=12)
    answers = processor.batch_decode(ids, skip_special_tokens=True)
    assert all(color in a for (color, _), a in zip(things, answers, strict=True)), answers
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


FAKE_KERNELS = """
import sys, types
from workers.hf.quantization import import_bitsandbytes
kernels = types.ModuleType("kernels")
kernels.get_kernel = lambda *args, **more: sys.exit("the hub was asked")
sys.modules["kernels"] = kernels
import_bitsandbytes()
assert sys.modules["kernels"] is kernels
"""


@pytest.mark.timeout(60)
def test_importing_bitsandbytes_does_not_ask_the_hub() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAKE_KERNELS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
