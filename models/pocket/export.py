"""Write the model in LLaVA's original format: ``python models/pocket-llava/export.py FOLDER``.

That is the layout of liuhaotian/llava-v1.5: ``LlavaLlamaForCausalLM`` with ``mm_projector``, and
the CLIP vision tower in a folder of its own, which the configuration names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, CLIPVisionModel

TOWER = "clip-vision-tower"
_RENAMES = (  # llava-hf's names (transformers 4 and 5 alike) to LLaVA's
    (r"^(model\.)?language_model\.model\.|^model\.language_model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
)
_VISION = re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?")


def export(checkpoint: Path, to: Path) -> None:
    """Convert the llava-hf ``checkpoint`` to the folder ``to``; weights keep their precision.

    Raises:
        FileNotFoundError: ``checkpoint`` has no weights.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    dtype = next(iter(weights.values())).dtype

    tower = CLIPVisionModel(config.vision_config).to(dtype)
    vision = {_VISION.sub("", name): w for name, w in weights.items() if _VISION.match(name)}
    prefix = "vision_model." if hasattr(tower, "vision_model") else ""
    tower.load_state_dict({prefix + name: weight for name, weight in vision.items()})
    tower.save_pretrained(to / TOWER)
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.save_pretrained(to / TOWER)
    processor.tokenizer.save_pretrained(to)

    language: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if _VISION.match(name):
            continue
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        language[name] = weight
    text = config.text_config
    if text.tie_word_embeddings:
        language["lm_head.weight"] = language["model.embed_tokens.weight"].clone()
    save_file(language, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(_config(config, to, dtype), indent=2) + "\n")
    generation = {"do_sample": False, "bos_token_id": text.bos_token_id}
    generation |= {"eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    (to / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _config(config: Any, to: Path, dtype: torch.dtype) -> dict[str, Any]:
    """LLaVA's flat configuration: the language model's, and what it says of vision."""
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    selected = {"default": "patch", "full": "cls_patch"}[config.vision_feature_select_strategy]
    return {
        **{name: value for name, value in text.items() if name not in ("dtype", "torch_dtype")},
        "rope_theta": rope.get("rope_theta", 10000.0),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_aspect_ratio": None,  # pictures are squeezed to the square, not padded
        "mm_vision_tower": str((to / TOWER).resolve()),
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": selected,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": text["max_position_embeddings"],
        "use_mm_proj": True,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("to", type=Path, metavar="FOLDER", help="where to write it")
    home = Path(__file__).parents[1] / "pocket-llava"
    parser.add_argument("--checkpoint", type=Path, default=home, help="a llava-hf checkpoint")
    options = parser.parse_args(argv)
    if not (options.checkpoint / "model.safetensors").exists():
        sys.exit(f"{options.checkpoint} holds no model.safetensors; give a llava-hf checkpoint.")
    export(options.checkpoint, options.to)
    print(f"Saved to {options.to}, the vision tower in {options.to / TOWER}.")
