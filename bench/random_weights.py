"""A LLaVA-1.5 of any size with random weights, to measure speed where no download is possible.

python -m bench.random_weights DIR                            7 billion
python -m bench.random_weights DIR --layers 10 --hidden 1024  199 million
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from bench.processes import ROOT

EMBEDDED = ROOT / "models" / "pocket-llava"
VOCABULARY = 32064
_FULL_HIDDEN, _FULL_LAYERS = 4096, 32
_COPIED = ("chat_template.jinja", "generation_config.json", "tokenizer_config.json")


def write(folder: Path, *, layers: int = _FULL_LAYERS, hidden: int = _FULL_HIDDEN) -> int:
    """Write a checkpoint in bfloat16 to ``folder`` and return its number of weights.

    The defaults are the shape of llava-1.5-7b. It writes the embedded model's language: its
    tokenizer, filled up to ``VOCABULARY`` with words no text is split into. A greedy answer does
    not end by itself: all weights of the special tokens' logits are 0.

    Raises:
        ValueError: ``hidden`` is no multiple of 256.
    """
    if hidden % 256:
        raise ValueError("the hidden size must be a multiple of 256")
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    own = json.loads((EMBEDDED / "config.json").read_text())
    config = LlavaConfig(**_config(own, layers=layers, hidden=hidden))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    special = [own["text_config"][f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    with torch.no_grad():
        model.get_output_embeddings().weight[[*special, own["image_token_index"]]] = 0
    model.save_pretrained(folder, max_shard_size="4GB")
    for name in _COPIED:
        shutil.copyfile(EMBEDDED / name, folder / name)
    _write_words(folder / "tokenizer.json")
    _write_processor(folder / "processor_config.json", config.vision_config)
    return sum(weight.numel() for weight in model.parameters())


def _config(own: dict[str, Any], *, layers: int, hidden: int) -> dict[str, Any]:
    """LLaVA-1.5's configuration in proportion, with the embedded model's special tokens."""
    special = {name: own["text_config"][name] for name in own["text_config"] if "token_id" in name}
    seen = hidden // 4
    return {
        "text_config": special
        | {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": -(-hidden * 43 // 1024) * 64,  # 11008 at 4096
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128,
            "num_key_value_heads": hidden // 128,
            "max_position_embeddings": own["text_config"]["max_position_embeddings"],
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": seen,
            "intermediate_size": 4 * seen,
            "num_hidden_layers": max(2, layers * 3 // 4),  # the last but one is read
            "num_attention_heads": seen // 64,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "image_token_index": own["image_token_index"],
        "image_seq_length": 576,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def _write_words(file: Path) -> None:
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    known = {*words.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    # A Ġ is a space in byte-level BPE; without merges that lead there, no text is split into these.
    words.update({f"Ġ~{index}": index for index in range(VOCABULARY) if index not in known})
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


def _write_processor(file: Path, vision: Any) -> None:
    processor = json.loads((EMBEDDED / "processor_config.json").read_text())
    side = {"height": vision.image_size, "width": vision.image_size}
    processor["image_processor"] |= {"crop_size": side, "size": side}
    processor["patch_size"] = vision.patch_size
    file.write_text(json.dumps(processor, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.random_weights",
        description="Write a LLaVA-1.5 with random weights in bfloat16: 7 billion, or fewer.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=_FULL_LAYERS, help="of the language model")
    parser.add_argument("--hidden", type=int, default=_FULL_HIDDEN, help="its width")
    args = parser.parse_args()
    try:
        weights = write(args.folder, layers=args.layers, hidden=args.hidden)
    except (ValueError, OSError) as exc:
        parser.error(str(exc))
    print(f"{args.folder}: {weights / 1e6:.1f} million weights")


if __name__ == "__main__":
    main()
