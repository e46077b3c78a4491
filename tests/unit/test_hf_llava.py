"""workers.hf.llava: checkpoints in LLaVA's original format compute what LLaVA computes.

The reference is LLaVA's forward pass written out here over the weights by their original names;
for the embedded model, the llava-hf checkpoint its export was made of.

pytest tests/unit/test_hf_llava.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from protocol.errors import EngineFailed, InvalidRequest
from tests.pictures import picture
from workers.settings import EMBEDDED_MODEL

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from models.pocket.export import export
from workers.hf import llava
from workers.llava.config import is_original

pytestmark = pytest.mark.timeout(60)  # transformers is slow to import

SIDE, PATCHES = 28, 2  # pixels and patches along one side of what the tower sees
VISION, HIDDEN = 16, 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh", "<im_patch>", "<im_start>", "<im_end>"]
MODEL_TYPES = {"Llama": "llava_llama", "Mistral": "llava_mistral", "Qwen2": "llava_qwen"}


# ---------------------------------------------------------------- tiny checkpoints


@dataclass
class Checkpoint:
    """A random one, and what its files were made of."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Any]
    tower: Any  # the one LLaVA would use
    language: Any

    def save(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.config))

    def move(self, *prefixes: str, to: str, under: str = "") -> dict[str, Any]:
        """Take weights out of the model's file into one of those that training leaves."""
        moved = {n: self.weights[n] for n in self.weights if n.startswith(prefixes)}
        rest = {n: w for n, w in self.weights.items() if n not in moved}
        save_file(rest, self.folder / "model.safetensors", metadata={"format": "pt"})
        torch.save({under + n: w for n, w in moved.items()}, self.folder / to)
        return moved


@dataclass
class Maker:
    """Makes checkpoints under one folder, each with other random weights."""

    root: Path
    made: int = 0

    def __call__(
        self,
        *,
        language: str = "Llama",
        projector: str = "mlp2x_gelu",
        tower_in_checkpoint: bool = False,
        vision_size: int = VISION,
        **config: Any,
    ) -> Checkpoint:
        self.made += 1
        torch.manual_seed(self.made)
        folder = self.root / f"checkpoint-{self.made}"
        folder.mkdir()
        tower = _tower(folder / "tower", vision_size)
        model, flat = _language_model(language)
        weights = dict(model.state_dict())
        if projector != "identity":
            layers = 1 if projector == "linear" else int(projector[3])
            for i in range(layers):
                size = vision_size if i == 0 else HIDDEN
                name = "model.mm_projector." + (f"{2 * i}." if projector != "linear" else "")
                weights[f"{name}weight"] = torch.randn(HIDDEN, size) / 4
                weights[f"{name}bias"] = torch.randn(HIDDEN) / 4
        if tower_in_checkpoint:
            trained = _tower(None, vision_size)
            names = "model.vision_tower.vision_tower.vision_model."
            weights |= {names + name: weight for name, weight in trained.state_dict().items()}
            weights[f"{names}embeddings.position_ids"] = torch.arange(PATCHES**2 + 1)[None]
            tower = trained if config.get("unfreeze_mm_vision_tower") else tower
        if config.get("image_aspect_ratio") == "anyres":
            weights["model.image_newline"] = torch.randn(HIDDEN)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        said = {
            **flat,
            "model_type": MODEL_TYPES[language],
            "mm_vision_tower": str(folder / "tower"),
            "mm_hidden_size": vision_size,
            "mm_projector_type": projector,
            "mm_vision_select_layer": -2,
            "torch_dtype": "float32",
            **config,
        }
        checkpoint = Checkpoint(folder, said, weights, tower, model)
        checkpoint.save()
        _tokenizer().save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return checkpoint


def _tower(folder: Path | None, size: int) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=SIDE // PATCHES,
    )
    tower = transformers.CLIPVisionModel(config).eval()
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if folder:
        tower.save_pretrained(folder)
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=MEAN,
            image_std=STD,
        ).save_pretrained(folder)
    return tower


def _language_model(family: str) -> tuple[Any, dict[str, Any]]:
    flat = {
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**flat)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model, flat


def _tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def load(folder: Path | str, base: Path | None = None, **options: Any) -> llava.Original:
    options = {
        "dtype": torch.float32,
        "attn_implementation": "sdpa",
        "quantization": None,
        "device": torch.device("cpu"),
    } | options
    return llava.load(str(folder), base=None if base is None else str(base), **options)


# ---------------------------------------------------------------- LLaVA, written out


def normalized(image: Image.Image) -> Any:
    """The pixels of an image [3, height, width] as CLIP takes them."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(image.height, image.width, 3).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def features(checkpoint: Checkpoint, pixels: Any) -> Any:
    """Of images [images, 3, side, side], as embeddings [images, patches, hidden]."""
    with torch.inference_mode():
        states = checkpoint.tower(pixels, output_hidden_states=True).hidden_states[-2]
    if checkpoint.config.get("mm_vision_select_feature", "patch") == "patch":
        states = states[:, 1:]
    kind, weights = checkpoint.config["mm_projector_type"], checkpoint.weights
    if kind == "identity":
        return states
    prefix = "model.mm_projector"
    if kind == "linear":
        return states @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]
    for i in range(int(kind[3])):
        states = torch.nn.functional.gelu(states) if i else states
        states = states @ weights[f"{prefix}.{2 * i}.weight"].T + weights[f"{prefix}.{2 * i}.bias"]
    return states


def answer(checkpoint: Checkpoint, *parts: Any) -> Any:
    """Logits [1, tokens, words] over ``parts``: lists of ids, and features [patches, hidden]."""
    embed = checkpoint.language.get_input_embeddings()
    rows = [embed(torch.tensor(part)) if isinstance(part, list) else part for part in parts]
    return checkpoint.language(inputs_embeds=torch.cat(rows)[None]).logits


def photo(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), Random(width).randbytes(width * height * 3))


def assert_same(
    checkpoint: Checkpoint, text: str, pictures: Sequence[Image.Image], *parts: Any, **loading: Any
) -> llava.Original:
    loaded = load(loading.pop("path", checkpoint.folder), **loading)
    inputs = loaded.encode(text, True, pictures)
    with torch.inference_mode():
        found, expected = loaded.network(**inputs).logits, answer(checkpoint, *parts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return loaded


def squeezed(checkpoint: Checkpoint, *squares: Image.Image) -> Any:
    """Features of images that need neither border nor tiles."""
    small = [
        normalized(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for square in squares
    ]
    return features(checkpoint, torch.stack(small))


A, B, C = (WORDS.index(letter) for letter in "abc")
BEGIN, START, END = (WORDS.index(word) for word in ("<s>", "<im_start>", "<im_end>"))


# ---------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("export") / "anything"
    export(EMBEDDED_MODEL, folder)
    return folder


def test_the_exported_model_answers_as_the_one_it_was_made_of(exported: Path) -> None:
    loaded = load(exported)
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        EMBEDDED_MODEL, dtype=torch.float32
    )
    processor = transformers.AutoProcessor.from_pretrained(EMBEDDED_MODEL, backend="pil")
    circle, square = picture(), picture("square", "blue", size=200)
    image = {"type": "image"}
    for pictures, question in [
        ([], "What is the capital of France?"),
        ([circle], "What color is the circle?"),
        ([square], "What do you see?"),
        ([circle, square], "Which one is blue?"),
    ]:
        content = [*[image] * len(pictures), {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        given = processor(
            text=text, images=pictures or None, add_special_tokens=False, return_tensors="pt"
        )
        inputs = loaded.encode(text, False, pictures)
        if pictures:
            assert torch.equal(inputs["pixel_values"], given["pixel_values"])
        start = given["input_ids"].shape[1]
        assert inputs["input_ids"].shape == (1, start)
        with torch.inference_mode():
            logits = loaded.network(**inputs).logits, reference(**given).logits
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        found = loaded.network.generate(**inputs, max_new_tokens=16)[0, start:]
        assert found.tolist() == reference.generate(**given, max_new_tokens=16)[0, start:].tolist()
        assert loaded.image_token_id not in found
    assert loaded.image_token_id == reference.config.text_config.vocab_size
    assert loaded.conversation is None  # it brings a chat template that knows pictures


def test_the_stored_precision(exported: Path) -> None:
    assert load(exported, dtype="auto").network.dtype is torch.bfloat16


# ---------------------------------------------------------------- variants


def test_version_1_5_pads_to_a_square(make: Maker) -> None:
    checkpoint = make(image_aspect_ratio="pad")
    wide, high = photo(40, 20), photo(30, 60)
    squares = [
        Image.new("RGB", (max(image.size),) * 2, tuple(int(mean * 255) for mean in MEAN))
        for image in (wide, high)
    ]
    squares[0].paste(wide, (0, 10))
    squares[1].paste(high, (15, 0))
    first, second = squeezed(checkpoint, *squares)
    parts = ([BEGIN, A], first, [B], second, [C])
    loaded = assert_same(checkpoint, "a <image> b <image> c", [wide, high], *parts)
    assert loaded.conversation == "llava_v1"
    assert loaded.image_token == "<image>"


def test_version_1_6_cuts_tiles(make: Maker) -> None:
    checkpoint = make(
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints="[(28, 56), (56, 28), (56, 56)]",
        unfreeze_mm_vision_tower=True,
        tower_in_checkpoint=True,
    )
    wide = photo(80, 20)  # best in 56 x 28, where it is 56 x 14 between borders of 7
    canvas = Image.new("RGB", (56, 28))
    canvas.paste(wide.resize((56, 14)), (0, 7))
    tiles = [wide.resize((SIDE, SIDE)), canvas.crop((0, 0, 28, 28)), canvas.crop((28, 0, 56, 28))]
    whole, left, right = features(checkpoint, torch.stack([normalized(tile) for tile in tiles]))
    # Two rows of patches; unpadding takes (2 - int(20 * 4 / 80)) // 2 = 0 of them.
    end = checkpoint.weights["model.image_newline"][None]
    rows = [left[:2], right[:2], end, left[2:], right[2:], end]
    assert_same(checkpoint, "a <image> b", [wide], [BEGIN, A], whole, *rows, [B])


def test_borders_of_tiles_are_cut_away(make: Maker) -> None:
    checkpoint = make(
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[28, 112]],
    )
    high = photo(20, 40)  # 28 x 56 in the middle, which the second and third tile are
    canvas = high.resize((28, 56))
    tiles = [high.resize((SIDE, SIDE)), canvas.crop((0, 0, 28, 28)), canvas.crop((0, 28, 28, 56))]
    whole, upper, lower = features(checkpoint, torch.stack([normalized(tile) for tile in tiles]))
    end = checkpoint.weights["model.image_newline"][None]
    rows = [upper[:2], end, upper[2:], end, lower[:2], end, lower[2:], end]
    assert_same(checkpoint, "<image> b", [high], [BEGIN], whole, *rows, [B])


def test_tiles_of_pictures_that_differ(make: Maker) -> None:
    checkpoint = make(
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[28, 56], [112, 28]],
    )
    loaded = load(checkpoint.folder)
    pictures = [photo(28, 56), photo(112, 20)]
    inputs = loaded.encode("<image> <image>", True, pictures)
    assert inputs["pixel_values"].shape == (2, 5, 3, SIDE, SIDE)
    assert inputs["image_sizes"].tolist() == [[56, 28], [20, 112]]
    # 4 of the whole picture; rows of patches by columns and an end: 4 x 3, then 2 x 9.
    placeholders = inputs["input_ids"] == loaded.image_token_id
    assert placeholders.sum() == (4 + 4 * 3) + (4 + 2 * 9)
    with torch.inference_mode():
        loaded.network(**inputs)


def test_version_1_0_has_a_linear_projector_and_marks(make: Maker) -> None:
    checkpoint = make(projector="linear", mm_use_im_start_end=True)
    square = photo(40, 40)
    seen = squeezed(checkpoint, square)[0]
    parts = ([BEGIN, A, START], seen, [END, B])
    loaded = assert_same(checkpoint, "a <image> b", [square], *parts)
    assert loaded.conversation is None


def test_without_a_border_the_middle_is_seen(make: Maker) -> None:
    checkpoint = make(image_aspect_ratio=None)
    wide = photo(56, 28)
    seen = squeezed(checkpoint, wide.crop((14, 0, 42, 28)))[0]
    assert_same(checkpoint, "<image> b", [wide], [BEGIN], seen, [B])


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu", "identity"])
def test_projectors(make: Maker, projector: str) -> None:
    size = HIDDEN if projector == "identity" else VISION
    checkpoint = make(projector=projector, vision_size=size)
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    assert_same(checkpoint, "a <image>", [square], [BEGIN, A], seen)


@pytest.mark.parametrize(
    ("language", "conversation"),
    [("Llama", "llava_v1"), ("Mistral", "mistral_instruct"), ("Qwen2", "llava_v1")],
)
def test_language_models(make: Maker, language: str, conversation: str) -> None:
    checkpoint = make(language=language, mm_vision_select_feature="cls_patch")
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    assert len(seen) == PATCHES**2 + 1
    loaded = assert_same(checkpoint, "a <image> b", [square], [BEGIN, A], seen, [B])
    assert loaded.conversation == conversation


def test_a_tower_in_the_checkpoint_counts_only_if_it_was_trained(make: Maker) -> None:
    for trained in (True, False):
        checkpoint = make(tower_in_checkpoint=True, unfreeze_mm_vision_tower=trained)
        square = photo(28, 28)
        seen = squeezed(checkpoint, square)[0]
        assert_same(checkpoint, "a <image>", [square], [BEGIN, A], seen)


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_shards_of_pickles(make: Maker, projector: str) -> None:
    checkpoint = make(projector=projector)
    (checkpoint.folder / "model.safetensors").unlink()
    names = sorted(checkpoint.weights)
    shards = {"pytorch_model-1-of-2.bin": names[::2], "pytorch_model-2-of-2.bin": names[1::2]}
    for file, inside in shards.items():
        torch.save({n: checkpoint.weights[n] for n in inside}, checkpoint.folder / file)
    files = {name: file for file, inside in shards.items() for name in inside}
    index = {"metadata": {}, "weight_map": files}
    (checkpoint.folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    assert_same(checkpoint, "a <image> b", [square], [BEGIN, A], seen, [B])


def test_a_tower_that_came_with_a_half_for_text(make: Maker) -> None:
    checkpoint = make()
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=checkpoint.tower.config.to_dict(),
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8},
        )
    )
    vision = {f"vision_model.{n}": w for n, w in checkpoint.tower.state_dict().items()}
    assert not clip.load_state_dict(vision, strict=False).unexpected_keys
    (checkpoint.folder / "tower" / "model.safetensors").unlink()
    clip.save_pretrained(checkpoint.folder / "tower")
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    assert_same(checkpoint, "a <image>", [square], [BEGIN, A], seen)


def test_a_stretched_context(make: Maker) -> None:
    checkpoint = make(rope_scaling={"type": "linear", "factor": 2.0})
    told = transformers.LlamaConfig(
        **{**checkpoint.language.config.to_dict(), "rope_parameters": None},
        rope_theta=500.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    stretched = transformers.LlamaForCausalLM(told).eval()
    stretched.load_state_dict(checkpoint.language.state_dict())
    checkpoint.language = stretched
    assert_same(checkpoint, "a b c", [], [BEGIN, A, B, C])


def test_tied_embeddings(make: Maker) -> None:
    checkpoint = make(tie_word_embeddings=True)
    checkpoint.weights.pop("lm_head.weight")
    damaged(checkpoint, lambda weights: None)
    embeddings = checkpoint.language.get_input_embeddings()
    checkpoint.language.get_output_embeddings().weight = embeddings.weight
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    assert_same(checkpoint, "a <image> b", [square], [BEGIN, A], seen, [B])


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_only_the_language_model_is_quantized(make: Maker, kind: str) -> None:
    pytest.importorskip("bitsandbytes")

    def in_8_bits(network_class: type, config: Any) -> Any:
        assert network_class is transformers.LlavaForConditionalGeneration
        assert config.text_config.hidden_size == HIDDEN
        skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)

    checkpoint = make(projector=kind)
    square = photo(28, 28)
    loaded = load(checkpoint.folder, quantization=in_8_bits)
    model = loaded.network.model
    assert {w.dtype for w in model.language_model.layers.parameters()} == {
        torch.int8,
        torch.float32,
    }
    inputs = loaded.encode("<image>", True, [square])
    with torch.inference_mode():
        found = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        torch.testing.assert_close(found, squeezed(checkpoint, square)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tower", "elsewhere/tower"])
def test_a_tower_beside_the_checkpoint_is_found(make: Maker, name: str) -> None:
    checkpoint = make()
    checkpoint.config["mm_vision_tower"] = name
    checkpoint.save()
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    assert_same(checkpoint, "a <image>", [square], [BEGIN, A], seen)


# ---------------------------------------------------------------- beside a base


def adapting(make: Maker, file: str, under: str = "", **config: Any) -> tuple[Checkpoint, Path]:
    """A checkpoint split into a base with the language model alone, and what adapts it."""
    checkpoint = make(**config)
    base = make.root / "base"
    base.mkdir()
    extra = checkpoint.move("model.mm_projector", to=file, under=under)
    assert extra
    for kept in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (checkpoint.folder / kept).rename(base / kept)
    (base / "config.json").write_text(checkpoint.language.config.to_json_string())
    return checkpoint, base


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "mlp3x_gelu"])
@pytest.mark.parametrize(
    ("file", "under"),
    [
        ("mm_projector.bin", ""),
        ("non_lora_trainables.bin", "base_model.model."),
        ("non_lora_trainables.bin", "base_model."),
    ],
)
def test_a_projector_over_a_base(make: Maker, file: str, under: str, projector: str) -> None:
    checkpoint, base = adapting(make, file, under, projector=projector)
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    parts = ([BEGIN, A], seen, [B])
    assert_same(checkpoint, "a <image> b", [square], *parts, base=base)


def test_what_was_trained_beside_an_adapter_replaces_the_bases_own(make: Maker) -> None:
    tuned, base = make(), make()
    torch.save(
        {f"base_model.model.{n}": w for n, w in tuned.weights.items() if "mm_projector" in n},
        tuned.folder / "non_lora_trainables.bin",
    )
    (tuned.folder / "model.safetensors").unlink()
    (tuned.folder / "adapter_config.json").write_text("{}")
    expected = Checkpoint(tuned.folder, tuned.config, tuned.weights, tuned.tower, base.language)
    square = photo(28, 28)
    seen = squeezed(expected, square)[0]
    before = (base.folder / "model.safetensors").read_bytes()
    assert_same(expected, "a <image>", [square], [BEGIN, A], seen, base=base.folder)
    assert (base.folder / "model.safetensors").read_bytes() == before


def test_words_added_in_training(make: Maker) -> None:
    tuned = make(mm_use_im_start_end=True)
    base = tuned.folder.rename(make.root / "base")
    tuned.folder = make.root / "tuned"
    tuned.folder.mkdir()
    tuned.config["mm_vision_tower"] = str(base / "tower")
    tuned.save()
    wordy = ("model.embed_tokens.", "lm_head.", "model.mm_projector.")
    more = {f"base_model.model.{n}": w for n, w in tuned.weights.items() if n.startswith(wordy)}
    torch.save(more, tuned.folder / "non_lora_trainables.bin")
    short = {n: w[:-3] if n.startswith(wordy[:2]) else w for n, w in tuned.weights.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    file = base / "tokenizer.json"
    words = json.loads(file.read_text())
    for word in WORDS[-3:]:
        del words["model"]["vocab"][word]
    file.write_text(json.dumps(words))
    square = photo(28, 28)
    seen = squeezed(tuned, square)[0]
    parts = ([BEGIN, A, START], seen, [END])
    assert_same(tuned, "a <image>", [square], *parts, base=base)


@pytest.mark.parametrize("file", ["mm_projector.bin", "adapter_config.json"])
def test_without_its_base_it_is_refused(make: Maker, file: str) -> None:
    checkpoint = make()
    (checkpoint.folder / "model.safetensors").unlink()
    (checkpoint.folder / file).write_bytes(b"{}")
    with pytest.raises(EngineFailed, match=file) as failure:
        load(checkpoint.folder)
    assert "--model-base" in failure.value.remedy


def test_a_whole_model_over_a_base_is_refused(make: Maker) -> None:
    whole, base = make(), make()
    with pytest.raises(EngineFailed, match="a whole model") as failure:
        load(whole.folder, base.folder)
    assert "Leave --model-base out" in failure.value.remedy


def test_a_base_of_another_size_is_refused(make: Maker) -> None:
    checkpoint, base = adapting(make, "mm_projector.bin")
    checkpoint.config["hidden_size"] = 2 * HIDDEN
    checkpoint.save()
    with pytest.raises(EngineFailed, match=r"mm_projector\.bin holds .* of shape"):
        load(checkpoint.folder, base)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava_mpt"},
        {"s2": True},
        {"image_aspect_ratio": "anyres_max_9"},
        {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"},
        {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": "(1x1),...,(6x6)",
        },
        {"mm_projector_type": "mlp2x_res2x_gelu"},
        {"mm_resampler_type": "perceiver"},
        {"mm_vision_select_feature": "cls"},
        {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_select_feature": "cls_patch",
        },
    ],
    ids=lambda config: next(reversed(config)),
)
def test_what_cannot_be_computed_is_refused(make: Maker, config: dict[str, Any]) -> None:
    checkpoint = make()
    checkpoint.config |= config
    checkpoint.save()
    with pytest.raises(EngineFailed, match=f"has {next(reversed(config))} "):
        load(checkpoint.folder)


def damaged(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], object]) -> Path:
    weights = dict(checkpoint.weights)
    change(weights)
    save_file(weights, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    return checkpoint.folder


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_a_missing_weight_is_named(make: Maker, projector: str) -> None:
    last = "2.bias" if projector == "mlp2x_gelu" else "bias"
    folder = damaged(make(projector=projector), lambda w: w.pop(f"model.mm_projector.{last}"))
    with pytest.raises(EngineFailed, match=r"lacks 1 .* model\.multi_modal_projector\..*bias"):
        load(folder)


def test_a_weight_without_a_place_is_named(make: Maker) -> None:
    folder = damaged(make(), lambda w: w.update({"model.vision_resampler.query": torch.ones(2)}))
    with pytest.raises(EngineFailed, match=r"holds 1 .* model\.vision_resampler\.query"):
        load(folder)


def test_a_pickle_that_is_no_weights_is_not_run(make: Maker) -> None:
    checkpoint, base = adapting(make, "mm_projector.bin")
    torch.save({"model.mm_projector.weight": Random(1)}, checkpoint.folder / "mm_projector.bin")
    with pytest.raises(EngineFailed, match=r"mm_projector\.bin cannot be read"):
        load(checkpoint.folder, base)


def test_another_kind_of_tower_is_refused(make: Maker) -> None:
    checkpoint = make()
    config = {"model_type": "siglip_vision_model"}
    (checkpoint.folder / "tower" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineFailed, match="siglip_vision_model"):
        load(checkpoint.folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "tower holds no weights"),
        ("preprocessor_config.json", r"tower holds no preprocessor_config\.json"),
    ],
)
def test_an_incomplete_tower_is_refused(make: Maker, file: str, message: str) -> None:
    checkpoint = make()
    (checkpoint.folder / "tower" / file).unlink()
    with pytest.raises(EngineFailed, match=message):
        load(checkpoint.folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_torn_file_is_named(make: Maker, file: str) -> None:
    checkpoint = make()
    (checkpoint.folder / file).write_bytes(b"{")
    with pytest.raises(EngineFailed, match=f"{file} cannot be read"):
        load(checkpoint.folder)


def test_a_tower_that_is_nowhere_is_named(make: Maker) -> None:
    checkpoint = make()
    checkpoint.config["mm_vision_tower"] = "/no/such/folder"
    checkpoint.save()
    with pytest.raises(EngineFailed, match="vision tower /no/such/folder"):
        load(checkpoint.folder)


def test_a_checkpoint_and_its_tower_from_the_hubs_cache(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make()
    checkpoint.config["mm_vision_tower"] = "some/tower"
    checkpoint.save()
    cached = {"some/model": checkpoint.folder, "some/tower": tmp_path / "tower"}
    (checkpoint.folder / "tower").rename(tmp_path / "tower")
    for name, folder in cached.items():
        entry = tmp_path / f"models--{name.replace('/', '--')}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text("0" * 40)
        (entry / "snapshots").mkdir()
        folder.rename(entry / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    square = photo(28, 28)
    seen = squeezed(checkpoint, square)[0]
    assert_same(checkpoint, "a <image>", [square], [BEGIN, A], seen, path="some/model")
    with pytest.raises(EngineFailed, match=r"checkpoint some/other .* cannot be fetched"):
        load("some/other")


def test_marks_without_embeddings_are_refused(make: Maker) -> None:
    checkpoint = make(mm_use_im_start_end=True)
    file = checkpoint.folder / "tokenizer.json"
    file.write_text(file.read_text().replace("im_start", "other"))
    with pytest.raises(EngineFailed, match="<im_start>"):
        load(checkpoint.folder)


# ---------------------------------------------------------------- texts and pictures


def test_pieces_of_a_tokenizer_without_options(make: Maker) -> None:
    pieces = pytest.importorskip("sentencepiece")
    checkpoint = make()
    text = checkpoint.folder / "text"
    text.write_text("a cat and a dog USER: ASSISTANT: red\n" * 20)
    pieces.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(checkpoint.folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (checkpoint.folder / name).unlink(missing_ok=True)
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (checkpoint.folder / "tokenizer_config.json").write_text(json.dumps(said))
    loaded = load(checkpoint.folder)
    model = pieces.SentencePieceProcessor(model_file=str(checkpoint.folder / "tokenizer.model"))
    found = loaded.encode("a cat <image>\nand ASSISTANT: red</s>USER:", True, [photo(28, 28)])
    chunks = [model.encode(text) for text in ("a cat ", "\nand ASSISTANT: red", "USER:")]
    seen = [loaded.image_token_id] * PATCHES**2
    assert found["input_ids"].tolist() == [[1, *chunks[0], *seen, *chunks[1], 2, *chunks[2]]]
    assert loaded.image_token_id == 300  # behind the tokenizer's, where it has more than the model


def test_one_beginning_whoever_writes_it(make: Maker) -> None:
    encode = load(make().folder).encode
    for text in ("a b", "<s> a b"):
        for add_special_tokens in (True, False):
            ids = encode(text, add_special_tokens, [])["input_ids"]
            assert ids.tolist() == [[BEGIN, A, B]]


def test_one_picture_for_each_placeholder(make: Maker) -> None:
    encode = load(make().folder).encode
    with pytest.raises(InvalidRequest, match="2 <image> for 1 images"):
        encode("<image> <image>", True, [photo(28, 28)])


def test_a_huge_picture_is_scaled_before_it_is_padded(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.llava.images.SQUARE_SIDE", 64)
    encode = load(make(image_aspect_ratio="pad").folder).encode
    huge = photo(256, 128)
    small = huge.copy()
    small.thumbnail((64, 64))
    found, expected = (encode("<image>", True, [image])["pixel_values"] for image in (huge, small))
    assert torch.equal(found, expected)


def test_a_placeholder_is_no_token_of_the_model(make: Maker) -> None:
    loaded = load(make().folder)
    assert loaded.image_token_id == len(WORDS)
    assert loaded.network.get_output_embeddings().weight.shape[0] == len(WORDS)
    with torch.inference_mode():
        embedded = loaded.network.get_input_embeddings()(torch.tensor([loaded.image_token_id]))
    assert embedded.shape == (1, HIDDEN)


@pytest.mark.parametrize(
    ("config", "original"),
    [
        ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}, True),
        ({"model_type": "llava", "vision_config": {}, "text_config": {}}, False),
        ({"model_type": "llama", "mm_vision_tower": None}, False),
        ({"model_type": "llama"}, False),
    ],
)
def test_the_format_is_told_by_the_configuration(config: dict[str, Any], original: bool) -> None:
    assert is_original(config) is original
