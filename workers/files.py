"""Where the files of a checkpoint are, and what its weights are called."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from protocol.errors import EngineFailed

if TYPE_CHECKING:
    import torch

ADDITIONS = ("non_lora_trainables.bin", "mm_projector.bin")
"""What LLaVA's training saves of a model beside a base; the first holds the second's weights."""
ADAPTER = "adapter_config.json"

_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
_SAFE = "*.safetensors"


def local(path: str, what: str, *, weights: bool = True) -> Path:
    """The directory of ``path``, a directory or a hub id; ``what`` it is, for the error.

    Raises:
        EngineFailed: it is neither here nor to be had.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        wanted = [*_SMALL, _SAFE, *ADDITIONS] if weights else [*_SMALL]
        folder = Path(snapshot_download(path, allow_patterns=wanted))
        if weights and not any(folder.glob(_SAFE)):
            snapshot_download(path, allow_patterns="*.bin")
    except Exception as exc:  # the hub's client raises some ten kinds
        raise EngineFailed(
            f"The {what} {path} is no directory here and cannot be fetched: {one_line(exc)}.",
            remedy="Give a directory, or the id of a model on the Hugging Face hub; with "
            "HF_HUB_OFFLINE=1 it must be in the local cache.",
        ) from exc
    return folder


def find(path: str, name: str) -> str | None:
    """The file ``name`` of ``path``, a directory or a hub id; ``None`` if it has none."""
    if Path(path).is_dir():
        found = Path(path, name)
        return str(found) if found.is_file() else None
    from transformers.utils import cached_file

    try:
        file: str | None = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError:  # no such model, or no way to it: said when it is loaded
        return None
    return file


def config_of(path: str) -> dict[str, Any]:
    """What ``config.json`` of ``path``, a directory or a hub id, holds; nothing if there is none.

    Raises:
        EngineFailed: it cannot be read.
    """
    file = find(path, "config.json")
    return {} if file is None else read_json(Path(file))


def tower(name: str, checkpoint: Path, *, weights: bool) -> Path:
    """The directory of the vision tower ``name``; one that came with the ``checkpoint`` wins.

    Raises:
        EngineFailed: as ``local``.
    """
    beside = (checkpoint / name, checkpoint / Path(name).name)
    found = next((folder for folder in beside if (folder / "config.json").is_file()), None)
    return found or local(name, "vision tower", weights=weights)


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``.

    Raises:
        EngineFailed: it is not there, or holds none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise _unreadable(file, exc) from exc
    if not isinstance(value, dict):
        raise _unreadable(file, TypeError("no JSON object"))
    return value


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each weight of the model in ``folder``, by name; empty if it holds none.

    Raises:
        EngineFailed: one of its files cannot be read.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return dict.fromkeys(_names(folder / name), folder / name)
        if index.is_file():
            files: dict[str, str] = read_json(index).get("weight_map", {})
            return {weight: folder / file for weight, file in files.items()}
    return {}


def read_weights(file: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights in ``file`` whose names begin with ``prefix``; nothing but tensors is unpickled.

    Raises:
        EngineFailed: it is damaged, or holds more than tensors.
    """
    import torch  # seconds; where a server holds the weights only their names are wanted

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: opened.get_tensor(name) for name in names}
        # Shards are mapped, not read; the format before torch 1.6 cannot be.
        mapped = zipfile.is_zipfile(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        return {name: weight for name, weight in weights.items() if name.startswith(prefix)}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as exc:
        raise _unreadable(file, exc) from exc


def one_line(exc: BaseException) -> str:
    """``exc`` without line breaks and stack trace, 300 characters at most."""
    words = " ".join(str(exc).split())
    line = f"{type(exc).__name__}: {words}" if words else type(exc).__name__
    return line if len(line) <= 300 else f"{line[:297]}..."


def _names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as exc:
            raise _unreadable(file, exc) from exc
    return list(read_weights(file))


def _unreadable(file: Path, exc: BaseException) -> EngineFailed:
    return EngineFailed(
        f"{file} cannot be read: {one_line(exc)}.",
        remedy="Download or export the checkpoint again, complete.",
    )
