"""Loading a checkpoint in LLaVA's original format, whole or beside a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from protocol.errors import EngineFailed
from workers import files
from workers.hf.llava.encoding import Encoding
from workers.llava import config, weights
from workers.llava.images import Preparation
from workers.llava.text import IMAGE_TOKEN, Tokenization, conversation, load_tokenizer

if TYPE_CHECKING:
    from workers.hf.model import Encode


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
    trained = config.holds_tower(settings, names)
    tower = files.tower(settings.tower, folder, weights=not trained)
    tokenize = Tokenization(load_tokenizer(source, settings), settings)
    network_config = config.network_config(
        settings, config.tower_config(tower), tokenize.image_token_id
    )
    network_class = getattr(transformers, network_config.architectures[0])
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
        pending.put(network, weights.of_tower(tower), tower)
    given = _projector(network, settings, names, pending)
    if additions is not None:
        given |= weights.without_prefixes(files.read_weights(additions))
    given = weights.renamed(given, weights.renames(settings.projector))
    pending.put(network, given, additions or source)
    pending.check(source)
    network.get_input_embeddings().register_forward_pre_hook(_within_vocabulary)
    return Original(
        network=network.eval(),
        tokenizer=tokenize.tokenizer,
        encode=Encoding(tokenize, Preparation(settings, network_config, tower)),
        image_token=IMAGE_TOKEN,
        image_token_id=tokenize.image_token_id,
        conversation=conversation(settings, tokenize.tokenizer),
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


def _dtype(wanted: torch.dtype | str, settings: config.Settings) -> torch.dtype | str:
    stored = getattr(torch, settings.dtype, None) if wanted == "auto" else None
    return stored if isinstance(stored, torch.dtype) else wanted


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
