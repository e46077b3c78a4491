"""Small checkpoints with random weights, of the architectures people bring, as directories.

The tokenizer is the embedded model's, with the special tokens that each processor wants.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from tests.processes import ROOT

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,  # with transformers' own, answers are one token again and again
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}assistant: "
)


def _tokenizer(*special: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "pocket-llava")
    tokenizer.chat_template = None
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _save(path: Path, network: Any, processor: Any) -> None:
    network.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=4)
    network.save_pretrained(path)
    processor.save_pretrained(path)


def _language_model(family: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        tokenizer = _tokenizer()
        tokenizer.chat_template = CHAT
        config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **TEXT)
        _save(path, getattr(transformers, f"{family}ForCausalLM")(config), tokenizer)

    return make


def _qwen_vl(family: str, image_processor: str = "Qwen2VLImageProcessor") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        tokenizer = _tokenizer(*marks)
        start, end, image, video = tokenizer.convert_tokens_to_ids(list(marks))
        text = TEXT | {"vocab_size": len(tokenizer), "head_dim": 16}
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        }
        vision: dict[str, Any] = {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "initializer_range": 0.15,
        }
        if family == "Qwen2VL":
            # SGLang reads a name that transformers 5 no longer writes.
            vision |= {"embed_dim": 32, "hidden_size": 64, "in_chans": 3}
        if family == "Qwen3VL":
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
            text["rope_parameters"]["mrope_interleaved"] = True
        config = getattr(transformers, f"{family}Config")(
            text_config=text,
            vision_config=vision,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
        network = getattr(transformers, _CLASSES[family])(config)
        pixels = getattr(transformers, image_processor)(
            patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=112 * 112
        )
        name = {"Qwen2_5_VL": "Qwen2_5_VLProcessor"}.get(family, f"{family}Processor")
        videos = {"Qwen3VL": "Qwen3VLVideoProcessor"}.get(family, "Qwen2VLVideoProcessor")
        processor = getattr(transformers, name)(
            image_processor=pixels,
            tokenizer=tokenizer,
            video_processor=getattr(transformers, videos)(),
            chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        )
        _save(path, network, processor)

    return make


_CLASSES = {
    "Qwen2VL": "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VL": "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VL": "Qwen3VLForConditionalGeneration",
}


def _llava(family: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        tokenizer = _tokenizer()
        text = transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT)
        common: dict[str, Any] = {
            "text_config": text,
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "vision_config": transformers.CLIPVisionConfig(**CLIP),
        }
        size = {"height": 56, "width": 56}
        pins = [[56, 112], [112, 56], [112, 112]]
        shared: dict[str, Any] = {
            "tokenizer": tokenizer,
            "patch_size": 14,
            "chat_template": CHAT.replace("IMAGE", "<image>"),
        }
        if family == "LlavaNext":
            config: Any = transformers.LlavaNextConfig(image_grid_pinpoints=pins, **common)
            pixels: Any = transformers.LlavaNextImageProcessor(
                size={"shortest_edge": 56}, crop_size=size, image_grid_pinpoints=pins
            )
            shared |= {
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            }
        else:
            common["vision_config"] = transformers.SiglipVisionConfig(
                **{name: value for name, value in CLIP.items() if name != "projection_dim"}
            )
            config = transformers.LlavaOnevisionConfig(
                image_grid_pinpoints=pins, video_token_index=0, **common
            )
            pixels = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins)
            shared |= {
                "num_image_tokens": 16,
                "vision_feature_select_strategy": "full",
                "video_processor": transformers.LlavaOnevisionVideoProcessor(size=size),
            }
            del shared["patch_size"]
        network = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        processor = getattr(transformers, f"{family}Processor")(image_processor=pixels, **shared)
        _save(path, network, processor)

    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    "llama": _language_model("Llama"),
    "qwen2": _language_model("Qwen2"),
    "gemma": _language_model("Gemma"),
    "gemma2": _language_model("Gemma2"),
    "llava-next": _llava("LlavaNext"),
    "llava-onevision": _llava("LlavaOnevision"),
    "qwen2-vl": _qwen_vl("Qwen2VL"),
    "qwen2.5-vl": _qwen_vl("Qwen2_5_VL"),
    "qwen3-vl": _qwen_vl("Qwen3VL"),
}


def make(name: str, path: Path) -> str:
    """Write the checkpoint ``name`` of ``MAKERS`` into ``path``; the same weights every time."""
    torch.manual_seed(0)
    MAKERS[name](path)
    return str(path)
