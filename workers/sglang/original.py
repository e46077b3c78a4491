"""A checkpoint in LLaVA's original format, and the view of it that SGLang loads.

The view is a directory with transformers' configuration of the model, the tokenizer as Tandem
reads it, and links to the weights: nothing is copied, and the checkpoint stays as it is. What the
configuration has under ``original`` is read by ``workers.sglang.server.models.llava_original``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import EngineFailed
from workers import files
from workers.llava import config as llava_config
from workers.llava.text import Tokenization, load_tokenizer
from workers.sglang.command import VIEW_ARCHITECTURE


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """What the files of one checkpoint say."""

    folder: Path
    weights: frozenset[Path]
    tower: Path
    tower_trained: bool  # its weights are the checkpoint's, not those in ``tower``
    settings: llava_config.Settings
    tokenize: Tokenization
    config: Any  # transformers'

    def write_view(self, inside: str) -> str:
        """Make the view, a directory ``inside`` the given one; blocking. Returns its path."""
        view = Path(inside, "checkpoint")
        view.mkdir()
        config = json.loads(self.config.to_json_string(use_diff=False)) | {
            "architectures": [VIEW_ARCHITECTURE],
            "original": {
                "folder": str(self.folder),
                "tower": str(self.tower),
                "tower_trained": self.tower_trained,
            },
        }
        if self.settings.dtype != "auto":
            config["dtype"] = self.settings.dtype
        (view / "config.json").write_text(json.dumps(config, indent=2))
        self.tokenize.tokenizer.save_pretrained(view)
        links = [
            *self.weights,
            self.folder / "generation_config.json",
            # SGLang wants a processor; what pictures become is ``original``'s affair.
            self.tower / "preprocessor_config.json",
        ]
        for file in links:
            if file.is_file():
                (view / file.name).symlink_to(file)
        return str(view)


def read(path: str) -> Original:
    """Read all of ``path``, a directory or a hub id, but the weights; blocking.

    Raises:
        EngineFailed: a file is missing or broken, or says what the model cannot compute.
    """
    folder = files.local(path, "checkpoint").absolute()
    settings = llava_config.parse(files.read_json(folder / "config.json"))
    weights = files.weight_files(folder)
    if not weights:
        raise _partial(path, folder)
    trained = llava_config.holds_tower(settings, weights)
    tower = files.tower(settings.tower, folder, weights=not trained).absolute()
    tokenize = Tokenization(load_tokenizer(folder, settings), settings)
    return Original(
        folder=folder,
        weights=frozenset(weights.values()),
        tower=tower,
        tower_trained=trained,
        settings=settings,
        tokenize=tokenize,
        config=llava_config.network_config(
            settings, llava_config.tower_config(tower), tokenize.image_token_id
        ),
    )


def _partial(path: str, folder: Path) -> EngineFailed:
    parts = [name for name in (*files.ADDITIONS, files.ADAPTER) if (folder / name).is_file()]
    if not parts:
        return EngineFailed(
            f"The checkpoint {path} holds no weights.",
            remedy="Download or export it again, complete.",
        )
    return EngineFailed(
        f"The checkpoint {path} holds only {parts[0]}, which adapts another model; SGLang serves "
        "whole ones.",
        remedy="Serve it with python -m workers.hf --model-base PATH, or merge it into its base.",
    )
