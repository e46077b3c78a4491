"""Loading a checkpoint in LLaVA's original format, whole or beside a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from protocol.errors import EngineFailed
from workers.hf.llava import config, files, weights
from workers.hf.llava.encoding import IMAGE_MARKS, IMAGE_TOKEN, Encoding
from workers.hf.llava.images import Preparation

if TYPE_CHECKING:
    from workers.hf.model import Encode

_PATCH_TOKEN = "<im_patch>"


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """A loaded checkpoint; ``network`` is in evaluation mode and on its device."""

    network: Any
    tokenizer: Any
    encode: Encode
    image_token: str
    image_token_id: int  # behind the vocabulary
    conversation: str | None  # the template its files tell of; None: they do not


def load(
    path: str,
    *,
    base: str | None,
    dtype: torch.dtype | str,
    attn_implementation: str,
    quantization: Callable[[type, Any], Any] | None,
    device: torch.device,
) -> Original:
    """Load the checkpoint ``path``; with ``base``, what it adds to the weights of that one.

    An adapter in ``path`` is left to the caller. ``quantization`` makes transformers'
    ``quantization_config`` (or None) of the network's class and configuration.

    Raises:
        EngineFailed: a file is missing or broken, or says what these classes cannot compute.
    """
    folder = files.local(path, "checkpoint")
    settings = config.parse(files.read_json(folder / "config.json"))
    source, additions = _weights_of(folder, path, base)
    names = files.weight_files(source)
    trained = settings.tower_trained and any(name.startswith(weights.TOWER) for name in names)
    tower = files.tower(settings.tower, folder, weights=not trained)
    tokenizer = _tokenizer(source, settings)
    # The first id that neither the network nor the tokenizer has: no text can hold it, and no
    # answer, for the head keeps its size.
    image_token_id = max(settings.text.vocab_size, len(tokenizer))
    network_class, network_config = config.network_config(
        settings, _tower_config(tower), image_token_id
    )
    network, report = network_class.from_pretrained(
        source,
        config=network_config,
        key_mapping=weights.renames(settings.projector),
        dtype=_dtype(dtype, settings),
        attn_implementation=attn_implementation,
        quantization_config=quantization and quantization(network_class, network_config),
        device_map={"": device},
        ignore_mismatched_sizes=True,  # reported below, in a sentence
        output_loading_info=True,
    )
    pending = weights.Pending.of(report)
    if not trained:
        pending.put(network, _tower_weights(tower), tower)
    given = _projector(network, settings, names, pending)
    if additions is not None:
        given |= weights.without_prefixes(files.read_weights(additions))
    given = weights.renamed(given, weights.renames(settings.projector))
    pending.put(network, given, additions or source)
    pending.check(source)
    network.get_input_embeddings().register_forward_pre_hook(_within_vocabulary)
    return Original(
        network=network.eval(),
        tokenizer=tokenizer,
        encode=Encoding(
            tokenizer,
            Preparation(settings, network_config, tower),
            image_token_id=image_token_id,
            image_marks=settings.image_marks,
        ),
        image_token=IMAGE_TOKEN,
        image_token_id=image_token_id,
        conversation=_conversation(settings, tokenizer),
    )


def _weights_of(folder: Path, path: str, base: str | None) -> tuple[Path, Path | None]:
    """The directory with the weights, and the file with those to put in their place."""
    whole = bool(files.weight_files(folder))
    found = [name for name in (*files.ADDITIONS, files.ADAPTER) if (folder / name).is_file()]
    if base is None:
        if not whole:
            partial = f"only {found[0]}, which adapts another model" if found else "no weights"
            raise EngineFailed(
                f"The checkpoint {path} holds {partial}.",
                remedy="Give the model it was trained on with --model-base."
                if found
                else "Download or export it again, complete.",
            )
        return folder, None
    if whole or not found:
        raise EngineFailed(
            f"The checkpoint {path} holds "
            + ("a whole model" if whole else "nothing to add to a base")
            + ", but --model-base is given.",
            remedy="Leave --model-base out, or give --model-path the adapter or the projector.",
        )
    source = files.local(base, "base")
    if not files.weight_files(source):
        raise EngineFailed(
            f"The base {base} holds no weights.", remedy="Download or export it again, complete."
        )
    return source, None if found[0] == files.ADAPTER else folder / found[0]


def _tower_config(tower: Path) -> CLIPVisionConfig:
    kind = files.read_json(tower / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise EngineFailed(
            f"The vision tower {tower} is a {kind}; LLaVA's checkpoints are served with CLIP's.",
            remedy="Choose a checkpoint with a CLIP tower, or one transformers itself can load.",
        )
    return CLIPVisionConfig.from_pretrained(tower)


def _dtype(wanted: torch.dtype | str, settings: config.Settings) -> torch.dtype | str:
    stored = getattr(torch, settings.dtype, None) if wanted == "auto" else None
    return stored if isinstance(stored, torch.dtype) else wanted


def _tower_weights(tower: Path) -> weights.Weights:
    """The weights of CLIP's vision half, named as the network's.

    Raises:
        EngineFailed: one is missing.
    """
    if not files.weight_files(tower):
        raise EngineFailed(
            f"The vision tower {tower} holds no weights.", remedy="Download it again, complete."
        )
    network, report = CLIPVisionModel.from_pretrained(
        tower, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
    )
    pending = weights.Pending.of(report)
    pending.strange.clear()  # the half for text
    pending.check(tower)
    return {f"model.vision_tower.{name}": weight for name, weight in network.state_dict().items()}


def _projector(
    network: Any, settings: config.Settings, names: Mapping[str, Path], pending: weights.Pending
) -> weights.Weights:
    """Exchange the projector where transformers has another; its weights by the original's names.

    Nothing has to be done, and none are returned, where it has the same.
    """
    if weights.is_stock(settings.projector):
        return {}
    stock = network.model.multi_modal_projector.linear_1.bias
    sizes = network.config.vision_config.hidden_size, network.config.text_config.hidden_size
    projector = weights.build_projector(settings.projector, *sizes).requires_grad_(False)
    network.model.multi_modal_projector = projector.to(stock.device, stock.dtype)
    pending.exchange("model.multi_modal_projector", projector)
    own = {file for name, file in names.items() if name.startswith(weights.PROJECTOR)}
    return {
        name: weight
        for file in own
        for name, weight in files.read_weights(file, weights.PROJECTOR).items()
    }


def _within_vocabulary(embedding: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the embedding look up a placeholder's id; features replace what it finds."""
    return (args[0].clamp(max=embedding.num_embeddings - 1), *args[1:])


def _tokenizer(folder: Path, settings: config.Settings) -> Any:
    """The tokenizer of ``folder``, with the marks around a picture if the model knows them.

    Raises:
        EngineFailed: a package to read it is missing, or the model was trained with the marks
            and has no embedding for them.
    """
    file = folder / "tokenizer_config.json"
    said = files.read_json(file) if file.is_file() else {}
    how = {}
    if (folder / "tokenizer.model").is_file():
        if not ((folder / "tokenizer.json").is_file() or _reads_sentencepiece()):
            raise EngineFailed(
                f"The tokenizer of {folder} is SentencePiece's, which cannot be read.",
                remedy="pip install sentencepiece protobuf",
            )
        # What such a tokenizer did before there were options; transformers' defaults changed.
        how = {name: True for name in ("legacy", "add_bos_token") if name not in said}
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    if settings.image_marks:
        patch = [_PATCH_TOKEN] if settings.patch_token else []
        tokenizer.add_tokens([*patch, *IMAGE_MARKS], special_tokens=True)
        if max(tokenizer.convert_tokens_to_ids(list(IMAGE_MARKS))) >= settings.text.vocab_size:
            raise EngineFailed(
                f"mm_use_im_start_end is set, but the vocabulary of {folder} has no "
                f"{' and '.join(IMAGE_MARKS)}.",
                remedy="Give the config.json and the tokenizer it was trained with.",
            )
    return tokenizer


def _reads_sentencepiece() -> bool:
    return bool(is_sentencepiece_available() and is_protobuf_available())


def _conversation(settings: config.Settings, tokenizer: Any) -> str | None:
    """The template whose end of an answer is the tokenizer's, unless it brings one for pictures.

    LLaVA's releases still carry their language model's own template, which knows no pictures.
    """
    if "image" in str(tokenizer.chat_template or ""):
        return None
    if tokenizer.eos_token == "<|im_end|>":
        return "chatml_direct"
    if tokenizer.eos_token != "</s>":
        return None
    if settings.model_type == "llava_mistral":
        return "mistral_instruct"
    # Before version 1.5, which brought the deeper projector, only the name tells.
    return None if settings.projector == "linear" else "llava_v1"
