"""workers.sglang.original: the view of a checkpoint in LLaVA's original format.

pytest tests/unit/test_sglang_original.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import EngineFailed
from protocol.messages import ChatMessage, GenerateRequest
from workers.settings import EMBEDDED_MODEL
from workers.sglang import command
from workers.sglang.settings import SglangSettings

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers

from models.pocket.export import TOWER, export
from workers.sglang.checkpoint import Checkpoint, is_original, load

pytestmark = pytest.mark.timeout(60)  # transformers is slow to import


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("export") / "original"
    export(EMBEDDED_MODEL, folder)
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """The same checkpoint, to be changed: files are links, and ``edit`` replaces one."""
    folder = tmp_path / "copy"
    (folder / TOWER).mkdir(parents=True)
    for file in exported.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(exported)).symlink_to(file)
    return folder


def edit(file: Path, **fields: Any) -> None:
    said = json.loads(file.read_text()) | fields
    file.unlink()
    file.write_text(json.dumps(said))


def opened(folder: Path, **options: Any) -> Checkpoint:
    return load(str(folder), trust_remote_code=False, **options)


def view_of(folder: Path, inside: Path) -> Path:
    original = opened(folder).original
    assert original is not None
    return Path(original.write_view(str(inside)))


def test_the_format_is_recognised(exported: Path, tmp_path: Path) -> None:
    assert is_original(str(exported))
    assert not is_original(str(EMBEDDED_MODEL))
    assert not is_original(str(tmp_path))
    assert opened(EMBEDDED_MODEL).original is None


def test_the_view_is_a_checkpoint_of_links(exported: Path, tmp_path: Path) -> None:
    view = view_of(exported, tmp_path)
    assert view.is_relative_to(tmp_path)
    config = transformers.AutoConfig.from_pretrained(view)
    assert isinstance(config, transformers.LlavaConfig)
    assert config.architectures == [command.VIEW_ARCHITECTURE]
    assert config.image_token_id == config.text_config.vocab_size == 2048
    assert str(config.dtype).endswith("bfloat16")
    assert config.original == {
        "folder": str(exported),
        "tower": str(exported / TOWER),
        "tower_trained": False,
    }
    weights = view / "model.safetensors"
    assert weights.is_symlink()
    assert weights.samefile(exported / "model.safetensors")
    assert {file.name for file in view.iterdir() if file.is_symlink()} == {
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    processor = transformers.AutoProcessor.from_pretrained(view)  # SGLang loads one
    read = opened(exported).tokenizer
    assert processor.tokenizer.get_vocab() == read.get_vocab()
    assert processor.tokenizer("a b").input_ids == read("a b").input_ids


def test_tiles_make_it_a_llava_next(copy: Path, tmp_path: Path) -> None:
    edit(
        copy / "config.json",
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints="[(112, 224), (224, 112)]",
    )
    config = transformers.AutoConfig.from_pretrained(view_of(copy, tmp_path))
    assert isinstance(config, transformers.LlavaNextConfig)
    assert config.architectures == [command.VIEW_ARCHITECTURE]
    assert config.image_grid_pinpoints == [[224, 112], [112, 224]]


@pytest.mark.parametrize(
    "shards", [("model-1.safetensors", "model-2.safetensors"), ("model-1.bin", "model-2.bin")]
)
def test_all_shards_and_nothing_else_is_linked(
    copy: Path, tmp_path: Path, shards: tuple[str, str]
) -> None:
    safe = shards[0].endswith("safetensors")
    (copy / "model.safetensors").unlink()
    for name in (*shards, "mm_projector.bin", "optimizer.bin"):
        (copy / name).write_bytes(b"")
    index = {"weight_map": {f"model.layers.{i}.w": name for i, name in enumerate(shards)}}
    name = "model.safetensors" if safe else "pytorch_model.bin"
    (copy / f"{name}.index.json").write_text(json.dumps(index))
    view = view_of(copy, tmp_path)
    assert {file.name for file in view.glob("model-*")} == set(shards)
    assert not [*view.glob("*projector*"), *view.glob("opt*")]


def test_a_trained_tower_is_not_looked_for_elsewhere(copy: Path, tmp_path: Path) -> None:
    (copy / TOWER / "model.safetensors").unlink()
    (copy / "model.safetensors").unlink()
    edit(copy / "config.json", unfreeze_mm_vision_tower=True)
    names = {"model.vision_tower.vision_tower.vision_model.w": "a.safetensors"}
    (copy / "a.safetensors").write_bytes(b"")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = json.loads((view_of(copy, tmp_path) / "config.json").read_text())
    assert config["original"]["tower_trained"] is True


@pytest.mark.parametrize("file", ["mm_projector.bin", "non_lora_trainables.bin"])
def test_a_part_of_a_model_is_refused(copy: Path, file: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / file).write_bytes(b"")
    with pytest.raises(EngineFailed, match=file) as failure:
        opened(copy)
    assert "workers.hf --model-base" in failure.value.remedy


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(EngineFailed, match="holds no weights"):
        opened(copy)


def test_what_cannot_be_computed_is_refused(copy: Path) -> None:
    edit(copy / "config.json", mm_resampler_type="perceiver")
    with pytest.raises(EngineFailed, match="has mm_resampler_type"):
        opened(copy)


# ---------------------------------------------------------------- prompts


def asked(text: str, images: int = 0) -> GenerateRequest:
    turn = ChatMessage(role="user", content="<image>" * images + text)
    return GenerateRequest(model="m", messages=(turn,), images=("x",) * images)


def test_its_own_template_is_kept(exported: Path) -> None:
    checkpoint = opened(exported, name="llava-v1.5")
    assert checkpoint.conversation is None
    assert checkpoint.stops == ()


def test_one_id_behind_the_vocabulary_for_each_picture(exported: Path) -> None:
    checkpoint = opened(exported)
    ids = checkpoint.encode(asked("What?", images=2))
    assert ids.count(2048) == 2
    assert ids.count(checkpoint.tokenizer.bos_token_id) == 1
    assert checkpoint.image_token_id == checkpoint.vocab_size == 2048


@pytest.mark.parametrize(
    ("name", "flag", "expected"),
    [
        ("llava-v1.5-7b", None, "llava_v1"),
        ("pocket", None, "llava_v1"),  # it was trained with: a deep projector, and </s>
        ("llava-v1.5-7b", "v0", "v0"),
    ],
)
def test_the_conversation_is_chosen_as_by_the_hf_worker(
    copy: Path, name: str, flag: str | None, expected: str
) -> None:
    (copy / "chat_template.jinja").unlink()
    checkpoint = opened(copy, name=name, conv_template=flag)
    assert checkpoint.conversation is not None
    assert checkpoint.conversation.name == expected
    assert checkpoint.stops == checkpoint.conversation.stops
    text = checkpoint.tokenizer.decode(checkpoint.encode(asked("Hi")))
    assert "A chat between a curious human" in text


def test_a_template_of_llava_for_a_checkpoint_of_transformers() -> None:
    checkpoint = opened(EMBEDDED_MODEL, conv_template="llava_v1")
    text = checkpoint.tokenizer.decode(checkpoint.encode(asked("Hi")))
    assert text.startswith("A chat between a curious human")
    assert text.endswith("USER: Hi ASSISTANT:")
    assert checkpoint.stops == ("</s>",)


def test_an_unknown_template_is_named() -> None:
    with pytest.raises(EngineFailed, match="no conversation template 'v9'"):
        opened(EMBEDDED_MODEL, conv_template="v9")


def test_the_server_loads_the_view_and_is_not_warmed_up_in_words() -> None:
    settings = SglangSettings(model_path="liuhaotian/llava", sglang_args=("--tp-size", "2"))
    args = command.server_args(
        command.of_view(settings, "/tmp/view"), device="cuda", dtype="auto", port=1
    )
    assert args[args.index("--model-path") + 1] == "/tmp/view"
    assert "--skip-server-warmup" in args
    assert args[-2:] == ["--tp-size", "2"]
