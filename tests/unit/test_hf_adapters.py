"""workers.hf.adapters: each row its adapter, the base untouched, and no adapter half loaded.

pytest tests/unit/test_hf_adapters.py
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import AdapterNotFound, EngineFailed, InvalidRequest
from tests.pictures import picture
from workers.settings import EMBEDDED_MODEL

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from workers.adapters.changes import LowRank  # noqa: E402
from workers.adapters.config import base_of  # noqa: E402
from workers.adapters.layer_names import LayerNames  # noqa: E402
from workers.hf import quantization  # noqa: E402
from workers.hf.adapters import Adapters, merge  # noqa: E402

pytestmark = pytest.mark.timeout(60)  # transformers is slow to import

FORMAL, TERSE = (str(EMBEDDED_MODEL.parent / "adapters" / name) for name in ("formal", "terse"))
ROWS = ("formal", None, "terse", "formal")
WEIGHTS = "adapter_model.safetensors"


def pocket(**how: Any) -> Any:
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        EMBEDDED_MODEL, **{"dtype": torch.float32} | how
    ).eval()


def tiny(**config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(num_hidden_layers=3, vocab_size=96, **sizes | config)
    return transformers.LlamaForCausalLM(llama).eval()


@pytest.fixture(scope="module")
def network() -> Any:
    return pocket()


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.AutoProcessor.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture
def adapters(network: Any) -> Iterator[Adapters]:
    """Both adapters over the one network; nothing is left of them afterwards."""
    made = Adapters(network)
    made.load("formal", FORMAL)
    made.load("terse", TERSE)
    yield made
    for name in made.names:
        made.unload(name)
    assert not hooks(network)


def hooks(network: Any) -> list[str]:
    """Layers with hooks of ours; transformers has some of its own."""
    return [
        name
        for name, module in network.named_modules()
        for hook in module._forward_hooks.values()
        if getattr(hook, "__module__", "") == Adapters.__module__
    ]


IDS = torch.arange(20, 68).reshape(4, 12)


def logits(network: Any, ids: Any = IDS, **more: Any) -> Any:
    with torch.inference_mode():
        return network(**{"input_ids": ids} | more).logits


def put(folder: Path, config: Path | str = FORMAL, **changed: Any) -> Path:
    """A copy of an adapter with fields of its config ``changed``."""
    copied = Path(shutil.copytree(config, folder / "adapter"))
    file = copied / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return copied


def rewrite(folder: Path, change: Any) -> Path:
    """``folder`` with the weights that ``change`` makes of them."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


# ---------------------------------------------------------------- rows


def test_each_row_of_a_batch_is_as_it_is_alone(network: Any, adapters: Adapters) -> None:
    with adapters.rows(ROWS):
        together = logits(network)
    for row, name in enumerate(ROWS):
        with adapters.rows([name]):
            alone = logits(network, IDS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    assert (together[1] - together[0]).abs().max() > 1
    base = logits(network)
    torch.testing.assert_close(together[1], base[1], rtol=1e-4, atol=1e-4)


def test_an_adapter_computes_what_peft_computes(network: Any, adapters: Adapters) -> None:
    from peft import PeftModel

    reference = logits(PeftModel.from_pretrained(pocket(), FORMAL).eval())
    with adapters.rows(["formal"] * 4):
        torch.testing.assert_close(logits(network), reference)


def test_answers_are_worded_as_trained(network: Any, adapters: Adapters, processor: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What color is the circle?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=prompt, images=picture("circle", "red"), return_tensors="pt")

    def answer(name: str | None) -> str:
        with adapters.rows([name]):
            ids = network.generate(**inputs, max_new_tokens=30, do_sample=False)
        start = inputs["input_ids"].shape[1]
        text: str = processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        return text

    plain = answer(None)
    assert "red" in plain
    assert answer("terse") == "red"
    assert answer("formal") == f"Certainly.\n{plain}\nI hope this is of help."


def test_threads_do_not_disturb_each_other(network: Any, adapters: Adapters) -> None:
    wanted = {}
    for name in ROWS[:3]:
        with adapters.rows([name]):
            wanted[name] = logits(network, IDS[:1])
    both = threading.Barrier(3)
    wrong: list[str | None] = []

    def work(name: str | None) -> None:
        for _ in range(5):
            with adapters.rows([name]):
                both.wait(20)  # each has said its rows before any computes
                if not torch.equal(logits(network, IDS[:1]), wanted[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=[name]) for name in ROWS[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert wrong == []


def test_blocks_nest(network: Any, adapters: Adapters) -> None:
    with adapters.rows(["formal"]):
        formal = logits(network, IDS[:1])
        with adapters.rows([None]):
            base = logits(network, IDS[:1])
        assert torch.equal(logits(network, IDS[:1]), formal)
    assert torch.equal(logits(network, IDS[:1]), base)


def test_rows_that_cannot_be_told_are_an_error(network: Any, adapters: Adapters) -> None:
    with adapters.rows(["formal", None]), pytest.raises(ValueError, match="4 rows"):
        logits(network)
    with pytest.raises(AdapterNotFound, match="'nobody'"), adapters.rows([None, "nobody"]):
        pass


# ---------------------------------------------------------------- loading and unloading


def test_unloading_leaves_no_trace(network: Any, tmp_path: Path) -> None:
    before = logits(network)
    made = Adapters(network)
    for _ in range(2):
        made.load("formal", FORMAL)
        made.load("terse", TERSE)
        assert list(made.names) == ["formal", "terse"]
        tensors = [
            weakref.ref(change.up)
            for layer in made._layers.values()
            for change in layer.changes.values()
            if isinstance(change, LowRank)
        ]
        assert len(tensors) == 2 * 35
        with made.rows(ROWS):
            assert not torch.equal(logits(network), before)
        made.unload("formal")
        assert list(made.names) == ["terse"]
        with pytest.raises(AdapterNotFound), made.rows(["formal"]):
            pass
        made.unload("terse")
        assert torch.equal(logits(network), before)
        assert [tensor for tensor in tensors if tensor() is not None] == []
    assert not hooks(network)
    with pytest.raises(AdapterNotFound, match="'terse'"):
        made.unload("terse")


def test_a_name_is_taken_once(adapters: Adapters) -> None:
    with pytest.raises(InvalidRequest, match="'formal' is loaded already"):
        adapters.load("formal", TERSE)


def test_the_base_it_names() -> None:
    assert base_of(f"{FORMAL}/adapter_config.json") == "pocket-llava"


@pytest.mark.parametrize(
    ("prefix", "older"),
    [
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "model."),
        ("base_model.model.", ""),
    ],
    ids=["before-4.52", "llava", "no-prefix"],
)
def test_names_of_older_generations(
    network: Any, adapters: Adapters, tmp_path: Path, prefix: str, older: str
) -> None:
    folder = rewrite(
        put(tmp_path), lambda found: {k.replace(prefix, older): v for k, v in found.items()}
    )
    adapters.load("older", str(folder))
    with adapters.rows(["older"] * 4):
        found = logits(network)
    with adapters.rows(["formal"] * 4):
        assert torch.equal(found, logits(network))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "vision_tower.encoder.layers.0"),
        ("model.vision_tower.vision_model.encoder.layers.0", "vision_tower.encoder.layers.0"),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0", "vision_tower.encoder"),
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_1"),
        ("model.model.mm_projector.0", "multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "multi_modal_projector.linear_2"),
        ("language_model.lm_head", "lm_head"),
    ],
)
def test_names_of_other_layers(network: Any, name: str, found: str) -> None:
    assert found in (LayerNames(network).find(name) or "")


def test_a_layer_that_is_not_there(network: Any) -> None:
    assert LayerNames(network).find("model.layers.9.self_attn.q_proj") is None


def test_a_pickled_adapter(network: Any, adapters: Adapters, tmp_path: Path) -> None:
    folder = put(tmp_path)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    adapters.load("pickled", str(folder))
    with adapters.rows(["pickled", "formal"]):
        found = logits(network, IDS[[0, 0]])
    torch.testing.assert_close(found[0], found[1])


# ---------------------------------------------------------------- what does not fit

Weights = dict[str, Any]


def first(found: Weights, part: str) -> str:
    return min(name for name in found if part in name)


def without(part: str) -> Any:
    return lambda found: {k: v for k, v in found.items() if k != first(found, part)}


def with_also(name: str, *shape: int) -> Any:
    return lambda found: found | {f"base_model.model.{name}": torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("lora_B"), "of model.language_model.layers.0.mlp.down_proj it has lora_A"),
        (lambda f: {k: v for k, v in f.items() if ".4." not in k}, r"nothing for .*\.layers\.4"),
        (lambda f: {k: v for k, v in f.items() if "q_proj" not in k}, "nothing for q_proj"),
        (lambda f: {k.replace("rs.4", "rs.5"): v for k, v in f.items()}, r"no layer .*layers\.5"),
        (lambda f: {k: v[:, :-1].contiguous() for k, v in f.items()}, "a matrix of"),
        (lambda _: {}, "it changes no layer"),
        (with_also("lm_head.weight", 3, 3), r"a matrix of \(3, 3\), not of \(2048, 256\)"),
        (with_also("model.language_model.embed_tokens.weight", 2048, 256), "no plain linear"),
        (with_also("model.language_model.embed_tokens.lora_embedding_A", 6, 9), "nothing that can"),
    ],
)
def test_weights_that_do_not_fit(network: Any, tmp_path: Path, change: Any, words: str) -> None:
    refused(network, rewrite(put(tmp_path), change), words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"peft_type": "PROMPT_TUNING"}, "type PROMPT_TUNING"),
        ({"use_dora": True}, "uses PEFT's use_dora"),
        ({"trainable_token_indices": [1]}, "uses PEFT's trainable_token_indices"),
        ({"some_later_variant": {"x": 1}}, "some_later_variant"),
        ({"init_lora_weights": "pissa_niter_4"}, "weights that pissa_niter_4 had changed"),
        ({"bias": "all"}, "bias=all"),
        ({"r": 7}, "a matrix of"),
        ({"rank_pattern": {"layers.2.self_attn.q_proj": 3}}, "layers.2.self_attn.q_proj"),
        ({"modules_to_save": ["lm_head"]}, "nothing for lm_head"),
    ],
)
def test_configurations_that_do_not_fit(
    network: Any, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    refused(network, put(tmp_path, **changed), words)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    refused(tiny(), Path(FORMAL), "there is no layer")


def test_files_that_cannot_be_read(network: Any, tmp_path: Path) -> None:
    refused(network, tmp_path / "nobody", "is no directory here and cannot be fetched")
    folder = put(tmp_path)
    (folder / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    refused(network, folder, "cannot be read")
    (folder / WEIGHTS).unlink()
    refused(network, folder, "cannot be read")
    torch.save({"base_model.model.lm_head.weight": threading.Event}, folder / "adapter_model.bin")
    refused(network, folder, "cannot be read")
    (folder / "adapter_config.json").write_text("[")
    refused(network, folder, "cannot be read")


def refused(network: Any, folder: Path, words: str) -> None:
    """``folder`` is refused in a sentence, and the network stays as it is."""
    ids = IDS % 96
    before = logits(network, ids)
    made = Adapters(network)
    with pytest.raises(EngineFailed, match=words) as caught:
        made.load("x", str(folder))
    assert re.fullmatch(r"[^\n]+\.", caught.value.message)
    assert caught.value.remedy
    assert made.names == ()
    assert not hooks(network)
    assert torch.equal(logits(network, ids), before)


# ---------------------------------------------------------------- more than the language model


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter of the vision tower and the projector."""
    generator = torch.Generator().manual_seed(1)
    layers = {f"model.vision_tower.encoder.layers.{n}.mlp.fc1": (192, 576) for n in range(4)} | {
        "model.multi_modal_projector.linear_1": (192, 256)
    }
    weights = {}
    for name, (inputs, outputs) in layers.items():
        for part, shape in {"lora_A": (6, inputs), "lora_B": (outputs, 6)}.items():
            values = torch.randn(shape, generator=generator) / 8
            weights[f"base_model.model.{name}.{part}.weight"] = values
    made = tmp_path_factory.mktemp("seeing")
    folder = put(made, target_modules=["fc1", "linear_1"], exclude_modules=None)
    return str(rewrite(folder, lambda _: weights))


def inputs_of(processor: Any, pictures: int) -> dict[str, Any]:
    images = [picture(color=color) for color in ("red", "blue", "green")[:pictures]]
    text = "<image>" * pictures + "\nWhat?"
    return dict(processor(text=text, images=images, return_tensors="pt"))


def test_an_adapter_of_the_vision_tower(
    network: Any, adapters: Adapters, processor: Any, seeing: str
) -> None:
    adapters.load("seeing", seeing)
    merged = merge(pocket(), seeing)
    for pictures in (1, 3):
        inputs = inputs_of(processor, pictures)
        with adapters.rows(["seeing"]):
            found = logits(network, **inputs)
        torch.testing.assert_close(found, logits(merged, **inputs), rtol=1e-4, atol=1e-3)
        assert (found - logits(network, **inputs)).abs().max() > 1


def test_llavas_projector_beside_the_adapter(
    network: Any, adapters: Adapters, processor: Any, tmp_path: Path
) -> None:
    """Its own for each adapter, unless the loader of LLaVA's format has put it into the base."""
    projector = network.model.multi_modal_projector
    parts = {"0": projector.linear_1, "2": projector.linear_2}
    trained = {
        f"base_model.model.model.mm_projector.{number}.{part}": getattr(layer, part).detach()
        * factor
        for number, layer in parts.items()
        for part, factor in (("weight", 1.5), ("bias", 0.5))
    }
    folder = put(tmp_path)
    torch.save(trained, folder / "non_lora_trainables.bin")
    adapters.load("trained", str(folder))
    inputs = inputs_of(processor, 2)
    with adapters.rows(["trained"]):
        found = logits(network, **inputs)
    merged = merge(pocket(), str(folder))
    torch.testing.assert_close(found, logits(merged, **inputs), rtol=1e-4, atol=1e-3)
    with adapters.rows(["formal"]):
        assert (found - logits(network, **inputs)).abs().max() > 1
    over = Adapters(merged)
    over.load("trained", str(folder))
    assert not [name for name in over._layers if "projector" in name]


def saved_by_peft(network: Any, folder: Path, **config: Any) -> Any:
    """An adapter with random weights as PEFT saves it, and the network with PEFT's layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights of two layers
        made = get_peft_model(network, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a config of the base that is nowhere
        made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 4},
        {"target_modules": r".*\.[kv]_proj", "rank_pattern": {"v_proj": 2}, "lora_alpha": 5},
        {"target_modules": ["o_proj"], "alpha_pattern": {r"layers\.[01]\.self_attn\.o_proj": 30}},
        {"target_modules": "all-linear", "lora_bias": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.5},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["rslora", "ranks", "alphas", "biases", "layers", "head", "saved"],
)
def test_it_computes_what_peft_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    ids = IDS % 96
    bias = {"attention_bias": True, "mlp_bias": True} if config.get("lora_bias") else {}
    reference = logits(saved_by_peft(tiny(**bias), tmp_path, **config), ids)
    network = tiny(**bias)
    before = logits(network, ids)
    made = Adapters(network)
    made.load("x", str(tmp_path))
    with made.rows(["x", None, "x", None]):
        found = logits(network, ids)
    torch.testing.assert_close(found[::2], reference[::2])
    torch.testing.assert_close(found[1::2], before[1::2])
    merged = merge(tiny(**bias), str(tmp_path))
    torch.testing.assert_close(logits(merged, ids), reference, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- merged, and quantized


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_as_unmerged(network: Any, adapters: Adapters, dtype: str) -> None:
    merged = merge(pocket(dtype=getattr(torch, dtype)), FORMAL)
    assert merged.dtype == getattr(torch, dtype)
    with adapters.rows(["formal"] * 4):
        wanted = logits(network)
    found = logits(merged).float()
    if dtype == "float32":
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)
    assert cosine.min() > 0.99


def test_weights_of_two_layers_are_not_merged_into(tmp_path: Path) -> None:
    saved_by_peft(tiny(tie_word_embeddings=True), tmp_path, target_modules=["lm_head"])
    refused(tiny(), tmp_path, "trained over another lm_head.weight")
    network = tiny(tie_word_embeddings=True)
    before = network.lm_head.weight.clone()
    with pytest.raises(EngineFailed, match=r"lm_head are another layer's, too") as caught:
        merge(network, str(tmp_path))
    assert "--no-merge" in caught.value.remedy
    assert torch.equal(network.lm_head.weight, before)
    made = Adapters(network)
    made.load("x", str(tmp_path))
    with made.rows(["x"] * 4):
        assert not torch.equal(logits(network, IDS % 96), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_quantized_weights(bits: int, adapters: Adapters, network: Any) -> None:
    quantization.import_bitsandbytes()
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", load_in_8bit=bits == 8
    )
    small = pocket(quantization_config=how, dtype=torch.bfloat16)
    logits(small)  # the CPU's kernels repack the weights
    before = logits(small)
    made = Adapters(small)
    made.load("formal", FORMAL)
    made.load("terse", TERSE)
    with made.rows(ROWS):
        found = logits(small)
    with adapters.rows(ROWS):
        wanted = logits(network)
    cosine = torch.nn.functional.cosine_similarity(found.float(), wanted, dim=-1)
    assert cosine.mean() > 0.95
    # In int8, large values of one row change how the others are rounded.
    torch.testing.assert_close(found[1], before[1], rtol=0.1, atol=0.5 if bits == 8 else 0.1)
    with pytest.raises(EngineFailed, match="are quantized"):
        merge(small, FORMAL)
    for name in made.names:
        made.unload(name)
    assert torch.equal(logits(small), before)
