"""Weights in 4 or 8 bits by bitsandbytes: which layers, whether it worked, and what it saved.

Only the language model is quantized. Its layers are nearly all of the weights, and the vision
tower, the projector and the head lose more by it than they would save.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops
from transformers.pytorch_utils import Conv1D

from protocol.errors import EngineFailed

log = logging.getLogger(__name__)

Bits = Literal[4, 8]

NF4_BLOCK = 64
"""Weights that share one scale; a block must not reach into the next row."""
NF4_CPU_ROWS = 32
"""Rows the CPU's kernel takes at once; it asserts that they come out even."""

# By class name, as peft and transformers tell them: bitsandbytes may not be installed.
_QUANTIZED = {"Params4bit": 4, "Int8Params": 8}


def import_bitsandbytes() -> Any:
    """bitsandbytes, imported without the network; call it before what imports it itself (peft).

    On a CPU with AVX512_BF16 its import asks the ``kernels`` package for native code from the
    hub, which waits where there is no network and runs what it gets where there is one. It has
    no switch for that, but its own code does the same work when ``kernels`` cannot be imported.

    Raises:
        EngineFailed: it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each call in int8
    try:
        with _unimportable("kernels"):
            import bitsandbytes
    except ImportError as exc:
        raise EngineFailed(
            "Weights in 4 or 8 bits need bitsandbytes, which cannot be imported.",
            remedy="In Tandem's folder: pip install '.[hf]'.",
        ) from exc
    return bitsandbytes


def prepare(config: Any) -> None:
    """Import what ``from_pretrained`` needs for a checkpoint that was quantized before.

    Raises:
        EngineFailed: bitsandbytes quantized it and is not installed.
    """
    if (_stored(config) or {}).get("quant_method") == "bitsandbytes":
        import_bitsandbytes()


def is_quantized(config: Any) -> bool:
    """Whether the weights of the network of ``config`` are, by the checkpoint or on loading."""
    return _stored(config) is not None


def refuse_quantized(config: Any, path: str) -> None:
    """Let only checkpoints pass whose weights are not quantized yet.

    Raises:
        EngineFailed: the checkpoint at ``path`` is.
    """
    stored = _stored(config)
    if stored is not None:
        raise EngineFailed(
            f"The weights of {path} are quantized already ({_method(stored)}).",
            remedy="Leave --load-4bit and --load-8bit out, or give the checkpoint it was made of.",
        )


def config_for(
    bits: Bits,
    network_class: Any,
    config: Any,
    *,
    device: torch.device,
    dtype: Any,
    trust_remote_code: bool = False,
) -> BitsAndBytesConfig:
    """What ``from_pretrained`` needs to quantize the language model of a checkpoint, and no more.

    ``network_class`` is a model's class, or one of the auto classes; ``dtype`` that of the other
    weights, or "auto" for the one in ``config``. In 4 bits the layers compute in it, too; on an
    accelerator never in float32, which would be the slowest way and no more exact. In 8 bits they
    compute columns with an outlier in 16 bits, for all rows of a batch if one row has it: the
    last bits of an answer's logits depend on its neighbours.

    Raises:
        EngineFailed: bitsandbytes is not there, or can take none of the layers.
    """
    import_bitsandbytes()
    network = _skeleton(network_class, config, trust_remote_code)
    name, decoder = _decoder(network)
    head = network.get_output_embeddings()
    layers = {
        f"{name}.{inner}".removeprefix("."): layer
        for inner, layer in decoder.named_modules()
        if layer is not head and (type(layer) is nn.Linear or isinstance(layer, Conv1D))
    }
    misfits = [name for name, layer in layers.items() if not _fits(layer, bits, device)]
    if len(misfits) == len(layers):
        raise EngineFailed(
            f"None of the {len(layers)} layers of this language model can be quantized by "
            f"bitsandbytes in {bits} bits.",
            remedy=f"Leave --load-{bits}bit out.",
        )
    if misfits:
        log.info("layers left out of quantization", extra={"layers": len(misfits)})
    heads = [name for name, module in network.named_modules() if module is head]
    # Matched as regular expressions from the start of a name, and as its end: without anchors,
    # "proj" would also keep every "q_proj", and "layers.1" the layers 10 to 19.
    skipped = [f"{re.escape(n)}(\\.|$)" for n in {*_beside(network, decoder), *heads, *misfits}]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_compute_dtype(config, device, dtype),
        llm_int8_skip_modules=skipped,
    )


def check(network: Any, bits: Bits) -> None:
    """Make sure that what was to be quantized is, and nothing else; before adapters are added.

    Raises:
        EngineFailed: not one layer is, or one outside the language model is.
    """
    quantized = [name for name, weight in network.named_parameters() if _bits(weight) == bits]
    if not quantized:
        raise EngineFailed(
            f"No layer of the model is in {bits} bits, though --load-{bits}bit asks for it.",
            remedy=f"Leave --load-{bits}bit out: bitsandbytes cannot quantize this model.",
        )
    decoder, _ = _decoder(network)
    outside = [n for n in quantized if decoder and not n.startswith(f"{decoder}.")]
    if outside:
        raise EngineFailed(
            f"{len(outside)} layers outside the language model are in {bits} bits, {outside[0]} "
            "for one, which would spoil what the model sees.",
            remedy=f"Leave --load-{bits}bit out for this model.",
        )


@torch.no_grad()
def settle(network: Any) -> None:
    """Call each quantized layer once, from one thread; only then may several threads call them.

    The first call moves a weight into its final layout (4 bits, on CPUs with AVX512_BF16) and
    its scales out of it (8 bits), step by step and in place: a second thread in between fails or
    computes nonsense. Merge adapters before this or never: bitsandbytes cannot read a moved 4-bit
    weight back.
    """
    for layer in _quantized_layers(network):
        layer(torch.zeros(1, layer.in_features, dtype=network.dtype, device=layer.weight.device))


def weight_bytes(network: Any) -> int:
    """Bytes of all weights and buffers, scales of quantized ones included, shared ones once."""
    scales = (tensor for layer in _quantized_layers(network) for tensor in _scales(layer))
    return _bytes_once(chain(network.parameters(), network.buffers(), scales))


def weight_bytes_before(network: Any) -> int:
    """What ``weight_bytes`` would be had nothing been quantized on loading."""
    layers = _quantized_layers(network)
    plain = (weight for weight in network.parameters() if not _bits(weight))
    values = sum(layer.in_features * layer.out_features for layer in layers)
    return _bytes_once(chain(plain, network.buffers())) + values * network.dtype.itemsize


def precision(network: Any) -> str:
    """How the weights are stored: ``bfloat16``, ``nf4``, ``int8``, ``gptq 4-bit``, ..."""
    for weight in network.parameters():
        if _bits(weight):
            return str(weight.quant_type) if _bits(weight) == 4 else "int8"
    stored = _stored(network.config)
    return str(network.dtype).removeprefix("torch.") if stored is None else _method(stored)


def release() -> None:
    """Give the memory that loading took and no longer needs back to the system."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    # glibc keeps what was freed, several times the size of a quantized model; others do not.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def _unimportable(name: str) -> Iterator[None]:
    """Let ``import name`` fail within the block, whether or not it was imported before."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _skeleton(network_class: Any, config: Any, trust_remote_code: bool) -> Any:
    """The network without its weights."""
    config = copy.deepcopy(config)  # building writes into it
    with torch.device("meta"), meta_device_safe_creation_ops():
        if issubclass(network_class, PreTrainedModel):
            return network_class._from_config(config)
        return network_class.from_config(config, trust_remote_code=trust_remote_code)


def _decoder(network: Any) -> tuple[str, Any]:
    """The language model within ``network`` and its name there, "" if it is the whole."""
    decoder = network.get_decoder()
    return next((name, module) for name, module in network.named_modules() if module is decoder)


def _beside(network: Any, decoder: Any, prefix: str = "") -> Iterator[str]:
    """Names of the largest modules that do not hold any of ``decoder``."""
    if network is decoder:
        return
    for name, module in network.named_children():
        if any(inner is decoder for inner in module.modules()):
            yield from _beside(module, decoder, f"{prefix}{name}.")
        else:
            yield prefix + name


def _fits(layer: Any, bits: Bits, device: torch.device) -> bool:
    """Whether bitsandbytes takes the shape of ``layer``."""
    rows, columns = layer.weight.shape
    if isinstance(layer, Conv1D):
        rows, columns = columns, rows
    return bits == 8 or (
        columns % NF4_BLOCK == 0 and (device.type != "cpu" or rows % NF4_CPU_ROWS == 0)
    )


def _compute_dtype(config: Any, device: torch.device, dtype: Any) -> Any:
    if dtype == "auto":
        dtype = config.dtype
    # A CPU that only emulates bfloat16 gets float32 from the loader: 2 to 5 times faster here.
    if device.type == "cpu" or dtype in (torch.float16, torch.bfloat16):
        return dtype
    return torch.bfloat16


def _bits(weight: Any) -> int:
    """Bits of a quantized weight, 0 for any other."""
    return _QUANTIZED.get(type(weight).__name__, 0)


def _quantized_layers(network: Any) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, nn.Linear) and _bits(m.weight)]


def _scales(layer: Any) -> Iterator[Any]:
    """The tensors that a quantized layer keeps outside its parameters and buffers."""
    weight = layer.weight
    if _bits(weight) == 8:
        held = [weight.SCB, layer.state.SCB]
    else:
        state = weight.quant_state
        nested = getattr(state, "state2", None)  # the scales of the scales
        held = [*vars(state).values(), *(vars(nested).values() if nested else ())]
    yield from (value for value in held if isinstance(value, torch.Tensor))


def _bytes_once(tensors: Iterable[Any]) -> int:
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def _stored(config: Any) -> dict[str, Any] | None:
    """How the checkpoint says its weights are quantized, if it does."""
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored:
            return stored if isinstance(stored, dict) else stored.to_dict()
    return None


def _method(stored: dict[str, Any]) -> str:
    """``gptq 4-bit`` from {"quant_method": "gptq", "bits": 4, ...}."""
    method = getattr(stored.get("quant_method"), "value", stored.get("quant_method")) or "unknown"
    bits = stored.get("bits") or stored.get("w_bit")
    if method == "bitsandbytes":
        bits = 4 if stored.get("load_in_4bit") else 8
    return f"{method} {bits}-bit" if bits else str(method)
