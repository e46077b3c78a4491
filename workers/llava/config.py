"""What the configuration of a checkpoint in LLaVA's original format says.

transformers is imported where it is needed: to tell the format needs none of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import EngineFailed
from workers import files

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

# "llava" is what checkpoints were called before there was more than one language model.
_LANGUAGE_MODELS = {
    "llava": "LlamaConfig",
    "llava_llama": "LlamaConfig",
    "llava_mistral": "MistralConfig",
    "llava_qwen": "Qwen2Config",
}
TOWER = "model.vision_tower."
"""How the names of the vision tower's weights begin."""

_SELECTED = {"patch": "default", "cls_patch": "full"}
_PROJECTOR = re.compile(r"linear|identity|mlp[1-9]\d*x_gelu")
_REMEDY = (
    "Choose a checkpoint with a CLIP tower over Llama, Mistral or Qwen2, or one that transformers "
    "itself can load."
)


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether ``config``, a checkpoint's ``config.json``, is in LLaVA's own format.

    It names its vision tower; transformers' formats hold the tower's configuration instead.
    """
    return isinstance(config.get("mm_vision_tower"), str) and "vision_config" not in config


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration, with LLaVA's defaults where it is silent."""

    model_type: str
    text: Any  # transformers' configuration of the language model
    tower: str  # hub id or directory
    tower_trained: bool  # its weights should be in the checkpoint
    feature_layer: int
    feature_selection: str  # transformers' word: "default" or "full"
    projector: str  # "linear", "identity" or "mlp2x_gelu" with any number
    padded: bool  # pictures become squares by a border
    resolutions: tuple[tuple[int, int], ...]  # width and height; empty: a picture is one tile
    image_marks: bool  # <im_start> and <im_end> around each picture
    patch_token: bool  # <im_patch> has an id of its own, which shifts those of the marks
    dtype: str  # "auto" where it is silent


def parse(config: Mapping[str, Any]) -> Settings:
    """Read ``config``, for which ``is_original`` holds.

    Raises:
        EngineFailed: it asks for what these classes cannot compute.
    """
    import transformers

    aspect = config.get("image_aspect_ratio") or "square"
    model_type = str(config.get("model_type"))
    selection = config.get("mm_vision_select_feature", "patch")
    projector = config.get("mm_projector_type", "linear")
    merge = config.get("mm_patch_merge_type", "flat")
    _require("model_type", model_type, model_type in _LANGUAGE_MODELS)
    _require("image_aspect_ratio", aspect, aspect in ("square", "pad", "anyres"))
    _require("mm_vision_select_feature", selection, selection in _SELECTED)
    _require("mm_projector_type", projector, _PROJECTOR.fullmatch(str(projector)) is not None)
    if aspect == "anyres":
        _require("mm_patch_merge_type", merge, merge == "spatial_unpad")
        _require("mm_vision_select_feature", selection, selection == "patch")
    for name in ("s2", "mm_resampler_type"):
        _require(name, config.get(name), not config.get(name))
    return Settings(
        model_type=model_type,
        text=_text_config(getattr(transformers, _LANGUAGE_MODELS[model_type]), config),
        tower=config["mm_vision_tower"],
        tower_trained=bool(config.get("unfreeze_mm_vision_tower")),
        feature_layer=config.get("mm_vision_select_layer", -2),
        feature_selection=_SELECTED[selection],
        projector=projector,
        padded=aspect == "pad",
        resolutions=_resolutions(config) if aspect == "anyres" else (),
        image_marks=bool(config.get("mm_use_im_start_end")),
        patch_token=bool(config.get("mm_use_im_patch_token", True)),
        dtype=config.get("torch_dtype") or config.get("dtype") or "auto",
    )


def holds_tower(settings: Settings, names: Iterable[str]) -> bool:
    """Whether the vision tower's weights are the checkpoint's own, whose weights have ``names``;
    LLaVA does not look at them unless they were trained."""
    return settings.tower_trained and any(name.startswith(TOWER) for name in names)


def network_config(settings: Settings, tower: CLIPVisionConfig, image_token_id: int) -> Any:
    """transformers' configuration of the network, whose ``architectures`` names its class."""
    from transformers import LlavaConfig, LlavaNextConfig

    full = settings.feature_selection == "full"
    common = {
        "text_config": settings.text,
        "vision_config": tower,
        "image_token_index": image_token_id,
        "image_seq_length": (tower.image_size // tower.patch_size) ** 2 + full,
        "vision_feature_layer": settings.feature_layer,
        "vision_feature_select_strategy": settings.feature_selection,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": settings.text.tie_word_embeddings,
    }
    if not settings.resolutions:
        return LlavaConfig(architectures=["LlavaForConditionalGeneration"], **common)
    # transformers writes the height first.
    grid = [[height, width] for width, height in settings.resolutions]
    return LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"], image_grid_pinpoints=grid, **common
    )


def tower_config(tower: Path) -> CLIPVisionConfig:
    """The configuration of the vision tower in ``tower``.

    Raises:
        EngineFailed: it is not there, or not CLIP's.
    """
    from transformers import CLIPVisionConfig

    kind = files.read_json(tower / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise EngineFailed(
            f"The vision tower {tower} is a {kind}; LLaVA's checkpoints are served with CLIP's.",
            remedy="Choose a checkpoint with a CLIP tower, or one transformers itself can load.",
        )
    return CLIPVisionConfig.from_pretrained(tower)


def _require(name: str, value: object, supported: bool) -> None:
    if not supported:
        raise EngineFailed(
            f"This LLaVA checkpoint has {name} {value!r}, which this worker cannot compute.",
            remedy=_REMEDY,
        )


def _text_config(config_class: Any, config: Mapping[str, Any]) -> Any:
    """The flat configuration's part that is the language model's."""
    known = {*config_class().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"architectures", "dtype", "model_type", "transformers_version", "_name_or_path"}
    return config_class(**{name: value for name, value in config.items() if name in known})


def _resolutions(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The sizes that a picture may be brought to, which some checkpoints hold as a string."""
    value = config.get("image_grid_pinpoints")
    try:
        pairs: Any = ast.literal_eval(value) if isinstance(value, str) else value
        found = tuple((int(width), int(height)) for width, height in pairs)
    except (SyntaxError, TypeError, ValueError):
        found = ()
    _require("image_grid_pinpoints", value, bool(found))
    return found
