"""Loading a checkpoint: which classes, which device and precision, and what the model can do.

Everything is read from the checkpoint's own files; no model's name is known here.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from protocol.errors import EngineFailed
from workers.answer import eos_ids
from workers.hf import cancel
from workers.hf.failures import is_out_of_memory, one_line
from workers.hf.settings import HfSettings
from workers.prompts import ApplyTemplate, template_of

log = logging.getLogger(__name__)

UNLIMITED_TOKENS = 1_000_000
"""What a model without a longest context (a recurrent one) gets as ``context_length``."""


@dataclass(frozen=True, slots=True)
class HfModel:
    """A loaded checkpoint; safe to use from several threads at once."""

    network: Any
    tokenizer: Any
    processor: Any  # None for a plain language model
    apply_template: ApplyTemplate | None
    image_token: str | None
    image_token_id: int | None
    eos_ids: frozenset[int]
    vocab_size: int
    context_length: int  # tokens
    # Tokenizers raise "Already borrowed" when one thread sets padding while another encodes.
    encoding: threading.Lock = field(default_factory=threading.Lock)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.device
        return device

    @property
    def precision(self) -> str:
        return str(self.network.dtype).removeprefix("torch.")

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def load(settings: HfSettings, progress: Callable[[str], None]) -> HfModel:
    """Load the checkpoint at ``settings.model_path``; blocking.

    Raises:
        EngineFailed: it is not there, it is broken, or the device cannot hold it.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    _limit_threads()
    device = _device(settings.device)
    try:
        return _load(settings, device, progress)
    except EngineFailed:
        raise
    except Exception as exc:
        log.debug("the checkpoint cannot be loaded", exc_info=True)
        raise _load_failure(settings, exc) from exc


def _load(settings: HfSettings, device: torch.device, progress: Callable[[str], None]) -> HfModel:
    path, trust = settings.model_path, settings.trust_remote_code
    progress("reading the configuration")
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    sees_images = _sees_images(config)
    if not sees_images and not _writes_text(config):
        raise EngineFailed(
            f"{path} is a {config.model_type}; this worker serves causal and vision-language "
            "models.",
            remedy="Choose another checkpoint.",
        )
    if sees_images:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        tokenizer = processor.tokenizer
    else:
        processor = None
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    progress("loading the weights")
    factory = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    network, report = factory.from_pretrained(
        path,
        config=config,
        dtype=_dtype(settings.dtype, device),
        trust_remote_code=trust,
        ignore_mismatched_sizes=True,  # reported below, in a sentence
        output_loading_info=True,
    )
    # transformers fills what is missing with random numbers and goes on.
    broken = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if broken:
        raise EngineFailed(
            f"The checkpoint {path} lacks {len(broken)} of its weights or has them in another "
            f"shape than its config says, {min(broken)} for one.",
            remedy="Download or export it again, complete.",
        )
    network = network.to(device).eval()
    cancel.install(network)
    ends = eos_ids(network.generation_config, network.config.get_text_config(), tokenizer)
    # A request means what it says: the checkpoint's own sampling defaults stay out of it.
    network.generation_config = GenerationConfig()
    image_token = getattr(processor, "image_token", None)
    return HfModel(
        network=network,
        tokenizer=tokenizer,
        processor=processor,
        apply_template=template_of(processor, tokenizer),
        image_token=image_token,
        image_token_id=None if image_token is None else _token_id(tokenizer, image_token),
        eos_ids=ends,
        vocab_size=network.get_input_embeddings().num_embeddings,
        context_length=_context_length(config, tokenizer),
    )


def _sees_images(config: Any) -> bool:
    remote = getattr(config, "auto_map", None) or {}
    return (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        or "AutoModelForImageTextToText" in remote
    ) and not config.is_encoder_decoder


def _writes_text(config: Any) -> bool:
    remote = getattr(config, "auto_map", None) or {}
    return (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    ) and not config.is_encoder_decoder


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        raise EngineFailed(
            f"The device {name!r} cannot be used: {one_line(exc)}.",
            remedy="Give --device cpu, or install the driver and the torch build it needs.",
        ) from exc
    return device


def _dtype(name: str, device: torch.device) -> Any:
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return "auto"
    # Emulated, bfloat16 is several times slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _token_id(tokenizer: Any, token: str) -> int:
    token_id: int = tokenizer.convert_tokens_to_ids(token)
    return token_id


def _context_length(config: Any, tokenizer: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions:
        return int(positions)
    # A tokenizer that knows no length says 10**30.
    return int(min(tokenizer.model_max_length, UNLIMITED_TOKENS))


def _limit_threads() -> None:
    """Use no more threads than this container may: torch counts the machine's cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = float(torch.get_num_threads())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        pass
    torch.set_num_threads(max(1, math.ceil(cores)))


def _load_failure(settings: HfSettings, exc: Exception) -> EngineFailed:
    path = settings.model_path
    if is_out_of_memory(exc):
        return EngineFailed(
            f"There is not enough memory for {path}.",
            remedy="Choose a smaller model, a smaller --dtype or another --device.",
        )
    if Path(path).is_dir():
        return EngineFailed(
            f"The checkpoint in {path} cannot be loaded: {one_line(exc)}.",
            remedy="Check that config, weights and tokenizer are complete and transformers' own; "
            "--log-level DEBUG shows the cause in full.",
        )
    return EngineFailed(
        f"The model {path} is no directory here and cannot be fetched: {one_line(exc)}.",
        remedy="Give --model-path a directory, or the id of a model on the Hugging Face hub; "
        "with HF_HUB_OFFLINE=1 it must be in the local cache.",
    )
