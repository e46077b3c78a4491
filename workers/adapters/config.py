"""What the ``adapter_config.json`` of a LoRA adapter says, and whether it can be served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.errors import EngineFailed
from workers.files import ADAPTER, local, read_json

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SERVE_MERGED = "Merge it into its base with PEFT and serve the result with --model-path."

# fmt: off
_UNDERSTOOD = frozenset(
    [
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
        "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
        "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
        "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
        "target_modules", "task_type", "use_rslora",
    ]
)
# fmt: on
"""Fields that are followed here, or that only training needs; any other one that is set changes
the computation in a way unknown here."""

_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "mica", "orthogonal")


def fetch(path: str) -> str:
    """The directory of the adapter at ``path``, a directory or a hub id.

    Raises:
        EngineFailed: it is neither here nor to be had.
    """
    return str(local(str(Path(path).expanduser()), "adapter"))


def base_of(config: str) -> str | None:
    """What the adapter with this config file was trained over, in its own words.

    Raises:
        EngineFailed: the file cannot be read.
    """
    named: str | None = read_json(Path(config)).get("base_model_name_or_path")
    return named


def config_of(path: str) -> tuple[Path, dict[str, Any]]:
    """The directory of the adapter at ``path``, a directory or a hub id, and its configuration.

    Raises:
        EngineFailed: it is not there, it cannot be read, or it is of a type that requests cannot
            choose one by one.
    """
    directory = Path(fetch(path))
    if not (directory / ADAPTER).is_file():
        raise EngineFailed(
            f"{path} holds no {ADAPTER}, so it is no LoRA adapter.",
            remedy=f"Give a directory with PEFT's {ADAPTER} and {WEIGHTS[0]}.",
        )
    config = read_json(directory / ADAPTER)
    _check_type(path, config)
    return directory, config


def _check_type(path: str, config: Mapping[str, Any]) -> None:
    """Raise unless this is LoRA with nothing to it that is unknown here."""
    kind = config.get("peft_type")
    init = config.get("init_lora_weights")
    strange = sorted(name for name, value in config.items() if value and name not in _UNDERSTOOD)
    if kind != "LORA":
        reason = f"is of PEFT's type {kind}"
    elif strange:
        reason = f"uses PEFT's {', '.join(strange)}"
    elif init not in _INITS_THAT_KEEP_THE_BASE:
        reason = f"was trained beside weights that {init} had changed"
    elif config.get("bias", "none") != "none":
        reason = f"brings biases of its own (bias={config['bias']})"
    else:
        return
    raise EngineFailed(
        f"The adapter {path} {reason}; only plain LoRA can be chosen by each request.",
        remedy=SERVE_MERGED,
    )


def rank_of(config: Mapping[str, Any]) -> int:
    """The largest rank that ``config`` says any layer has."""
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)
