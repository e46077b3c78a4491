"""workers.hf.loading: adapters over a base, quantized weights, and what cannot be loaded.

pytest tests/unit/test_hf_loading.py
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models.pocket.export import export
from protocol.errors import EngineFailed
from tests.checkpoints import make
from tests.hf import asked, job_of, running
from tests.pictures import encoded, picture
from tests.processes import ROOT
from workers.hf.loading import load
from workers.hf.model import HfModel
from workers.hf.settings import HfSettings
from workers.hf.threads import Threads

pytestmark = pytest.mark.timeout(120)

BASE = str(ROOT / "models" / "pocket-llava")
FORMAL = str(ROOT / "models" / "adapters" / "formal")
TERSE = str(ROOT / "models" / "adapters" / "terse")
RED = encoded(picture("circle", "red"))


def loaded(**flags: Any) -> HfModel:
    """A model on the CPU, in float32 unless ``flags``, the worker's, say otherwise."""
    return load(HfSettings(**{"dtype": "float32", "device": "cpu"} | flags), lambda _: None)


def color(model: HfModel, **fields: Any) -> str:
    """What it says of a red circle."""
    job = job_of(model, asked("What color is the circle?", RED, **fields))
    with running(lambda deliver: Threads(1, deliver=deliver)) as (runner, answers):
        runner.submit(job)
        return answers.text(job)


def refused(**flags: Any) -> EngineFailed:
    with pytest.raises(EngineFailed) as caught:
        loaded(**flags)
    return caught.value


def test_many_threads_encode_at_once() -> None:
    model = loaded()
    requests = [asked(f"Is it {n}?", *[RED][: n % 2], max_new_tokens=1) for n in range(6)]
    alone = [job_of(model, request).inputs["input_ids"].tolist() for request in requests]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda n: job_of(model, requests[n % 6]).inputs["input_ids"], range(300))
        assert all(ids.tolist() == alone[n % 6] for n, ids in enumerate(found))


# ---------------------------------------------------------------- --model-base


def test_an_adapter_over_its_base_is_merged() -> None:
    merged = loaded(model_path=FORMAL, model_base=BASE)
    beside = loaded(model_path=FORMAL, model_base=BASE, merge=False)
    plain = loaded()
    assert merged.adapter_names == ()
    assert beside.adapter_names == ("base", "formal")
    assert color(merged) == color(beside) == color(beside, adapter="formal")
    assert color(merged).startswith("Certainly.")
    assert color(beside, adapter="base") == color(plain)
    hooks = [sum(len(m._forward_hooks) for m in one.network.modules()) for one in (merged, plain)]
    assert hooks[0] == hooks[1], "nothing is left beside merged weights"


@pytest.mark.parametrize("bits", [{"load_4bit": True}, {"load_8bit": True}], ids=str)
def test_quantized_weights_keep_the_adapter_beside_them(bits: dict[str, bool]) -> None:
    model = loaded(model_path=TERSE, model_base=BASE, adapter=(f"formal={FORMAL}",), **bits)
    assert model.precision == ("nf4" if "load_4bit" in bits else "int8")
    assert model.adapter_names == ("base", "terse", "formal")
    assert color(model).strip().lower() == "red"
    assert color(model, adapter="formal").startswith("Certainly.")
    assert "red" in color(model, adapter="base").lower()


def test_an_adapter_without_a_base_says_which_it_wants() -> None:
    error = refused(model_path=FORMAL)
    assert "--model-base" in error.remedy
    assert "pocket-llava" in error.remedy


def test_the_wrong_base_is_refused(tmp_path: Path) -> None:
    error = refused(model_path=FORMAL, model_base=make("llama", tmp_path))
    assert "does not fit" in error.message


# ---------------------------------------------------------------- LLaVA's own format


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as LLaVA would have saved it."""
    folder: Path = tmp_path_factory.mktemp("original") / "some-folder"
    export(Path(BASE), folder)
    return folder


def test_the_original_format_answers_like_the_conversion(original: Path) -> None:
    model = loaded(model_path=str(original))
    assert model.image_token == "<image>"
    assert color(model) == color(loaded())


@pytest.mark.parametrize("merge", [True, False])
def test_llavas_lora_brings_its_projector(original: Path, tmp_path: Path, merge: bool) -> None:
    """The adapter's projector, and with --no-merge the base's own for those who choose the base."""
    adapter = tmp_path / "trained"
    shutil.copytree(FORMAL, adapter)
    shutil.copy(original / "config.json", adapter)
    weights = loaded(model_path=str(original)).network.state_dict()
    projector = {
        f"base_model.model.model.mm_projector.{layer}.{kind}": torch.zeros_like(
            weights[f"model.multi_modal_projector.linear_{number}.{kind}"]
        )
        for layer, number in ((0, 1), (2, 2))
        for kind in ("weight", "bias")
    }
    torch.save(projector, adapter / "non_lora_trainables.bin")
    model = loaded(model_path=str(adapter), model_base=str(original), merge=merge)
    assert "I see no image." in color(model)
    if not merge:
        assert "red" in color(model, adapter="base").lower()


def test_a_legacy_template_can_be_asked_for() -> None:
    model = loaded(conv_template="llava_v1")
    assert model.apply_template is not None
    prompt = model.apply_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    )
    assert prompt.endswith("USER: <image>\nHi ASSISTANT:")
    assert "</s>" in model.stops


def test_an_unknown_template_is_refused_with_those_there_are() -> None:
    error = refused(conv_template="vicuna_v9")
    assert "vicuna_v9" in error.message
    assert "vicuna_v1" in f"{error.message} {error.remedy}"


# ---------------------------------------------------------------- quantization


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    file.write_text(json.dumps(config))
    error = refused(model_path=str(tmp_path / "model"), load_4bit=True)
    assert "awq" in error.message
    assert "--load-4bit" in error.remedy


def test_both_precisions_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        HfSettings(load_4bit=True, load_8bit=True)


@pytest.mark.parametrize("adapter", ["formal", "=x", "formal=", "base=x", "a b=x"])
def test_adapters_are_given_as_name_and_path(adapter: str) -> None:
    with pytest.raises(ValidationError):
        HfSettings(adapter=(adapter,))


def test_flash_attention_is_refused_where_there_is_no_gpu() -> None:
    error = refused(use_flash_attn=True)
    assert "NVIDIA GPU" in error.message
