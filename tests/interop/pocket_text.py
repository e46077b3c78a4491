"""The language model within the embedded one, as a checkpoint that FastChat's worker can load."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import ROOT

SOURCE = ROOT / "models" / "pocket-llava"
_PREFIX = "language_model."


def write(folder: Path) -> None:
    """Write it for the transformers of FastChat's day: the weights are the same, by other names,
    and so is the tokenizer, under a class that was known then."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    weights = load_file(SOURCE / "model.safetensors")
    language = {
        name.removeprefix(_PREFIX): weight
        for name, weight in weights.items()
        if name.startswith(_PREFIX)
    }
    save_file(language, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((SOURCE / "config.json").read_text())["text_config"]
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((SOURCE / "tokenizer_config.json").read_text())
    tokenizer = {
        name: tokenizer[name] for name in tokenizer if name.endswith("_token") or "max" in name
    }
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_bytes((SOURCE / name).read_bytes())
