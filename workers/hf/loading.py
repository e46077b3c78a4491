"""Loading a checkpoint: which classes, which device and precision, and what the model can do.

Everything is read from the checkpoint's own files; no model's name is known here.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from PIL import Image
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

from protocol.errors import BadImage, EngineFailed
from protocol.messages import BASE
from workers import files, templates
from workers.adapters.config import base_of, fetch
from workers.answer import eos_ids
from workers.files import ADAPTER, one_line
from workers.grammar import Grammars
from workers.hf import adapters, attention, cancel, llava, machine, quantization
from workers.hf.failures import is_out_of_memory
from workers.hf.model import Encode, HfModel, Inputs
from workers.hf.settings import HfSettings
from workers.llava.config import is_original
from workers.prompts import ApplyTemplate, pictures_for, template_of

log = logging.getLogger(__name__)

UNLIMITED_TOKENS = 1_000_000
"""What a model without a longest context (a recurrent one) gets as ``context_length``."""

Progress = Callable[[str], None]


@dataclass(slots=True)
class _Loaded:
    """A network and its surroundings, before adapters."""

    network: Any
    tokenizer: Any
    encode: Encode
    apply_template: ApplyTemplate | None
    image_token: str | None
    image_token_id: int | None
    conversation: str | None = None  # the legacy template it was trained with, if it tells
    guess: str | None = None  # the one LLaVA would choose by the model's name


def load(settings: HfSettings, progress: Progress) -> HfModel:
    """Load the checkpoint at ``settings.model_path``; blocking.

    Raises:
        EngineFailed: it is not there, it is broken, or the device cannot hold it.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    machine.limit_threads()
    device = machine.device_of(settings.device)
    try:
        return _Loader(settings, device, progress).load()
    except EngineFailed:
        raise
    except Exception as exc:
        log.debug("the checkpoint cannot be loaded", exc_info=True)
        raise _load_failure(settings, exc) from exc


class _Loader:
    def __init__(self, settings: HfSettings, device: torch.device, progress: Progress) -> None:
        self._settings = settings
        self._device = device
        self._progress = progress
        self._dtype = machine.dtype_of(settings.dtype, device)
        self._attention = attention.choose(settings.use_flash_attn, device, self._dtype)
        if settings.load_4bit or settings.load_8bit:
            # Else transformers reads far ahead of what quantizes, at twice the memory.
            os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        self._bits: quantization.Bits | None = (
            4 if settings.load_4bit else 8 if settings.load_8bit else None
        )

    def load(self) -> HfModel:
        settings = self._settings
        adapter = self._adapter()
        base = settings.model_base if adapter else settings.model_path
        if settings.use_flash_attn:
            self._progress(f"attention by {self._attention}")
        self._progress("reading the configuration")
        loaded = self._original(adapter)
        if loaded is None:
            if settings.model_base and not adapter:
                raise EngineFailed(
                    f"{settings.model_path} is a whole model, but --model-base is given.",
                    remedy="Leave --model-base out, or give --model-path the adapter.",
                )
            loaded = self._transformers(base or settings.model_path)
        network = loaded.network
        if self._bits:
            quantization.check(network, self._bits)
        merge = (
            adapter is not None and settings.merge and not quantization.is_quantized(network.config)
        )
        if adapter and merge:
            self._progress(f"adding {adapter} into the weights")
            network = adapters.merge(network, adapter)
        switchable = adapters.Adapters(network)
        default = None
        if adapter and not merge:
            if settings.merge:
                self._progress("keeping the adapter beside the weights, which are quantized")
            name = self._settings.model_path.rstrip("/").rsplit("/", 1)[-1]
            default = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:64]
            if default == BASE or default in settings.adapters:
                raise EngineFailed(
                    f"The adapter of --model-path would be called {default!r}, which is taken.",
                    remedy="Rename its folder, or give the other --adapter another name.",
                )
            switchable.load(default, adapter)
        for name, path in settings.adapters.items():
            self._progress(f"loading the adapter {name}")
            switchable.load(name, path)
        quantization.settle(network)
        cancel.install(network)
        self._report_memory(network)
        return self._model(loaded, network, switchable, default)

    def _adapter(self) -> str | None:
        """The folder of the LoRA adapter that --model-path is, if it is one.

        Raises:
            EngineFailed: it adapts something, and --model-base does not say what.
        """
        path, base = self._settings.model_path, self._settings.model_base
        config = files.find(path, ADAPTER)
        if config is None:
            return None
        if base is None:
            named = base_of(config)
            raise EngineFailed(
                f"{path} is a LoRA adapter, not a whole model.",
                remedy=f"Give its base, too: --model-base {named or 'PATH'}.",
            )
        return fetch(path)

    # ---- the two formats

    def _original(self, adapter: str | None) -> _Loaded | None:
        """A checkpoint in LLaVA's own format, if it is one."""
        path, base = self._settings.model_path, self._settings.model_base
        beside = adapter is not None and not (self._settings.merge and self._bits is None)
        if (
            base is not None
            and is_original(files.config_of(base))
            and (beside or not is_original(files.config_of(path)))
        ):
            # What an adapter changes in the projector stays with it, and the base is the base.
            found = llava.load(base, base=None, **self._how())
        elif is_original(files.config_of(path)):
            found = llava.load(path, base=base, **self._how())
        else:
            return None
        return _Loaded(
            network=found.network,
            tokenizer=found.tokenizer,
            encode=found.encode,
            apply_template=template_of(found.tokenizer),
            image_token=found.image_token,
            image_token_id=found.image_token_id,
            conversation=found.conversation,
            guess=templates.for_model(self._settings.name),
        )

    def _how(self) -> dict[str, Any]:
        self._progress("loading the weights")
        return {
            "dtype": self._dtype,
            "attn_implementation": self._attention,
            "quantization": self._quantization,
            "device": self._device,
        }

    def _quantization(self, network_class: Any, config: Any) -> Any:
        if self._bits is None:
            return None
        return quantization.config_for(
            self._bits,
            network_class,
            config,
            device=self._device,
            dtype=self._dtype,
            trust_remote_code=self._settings.trust_remote_code,
        )

    def _transformers(self, path: str) -> _Loaded:
        """A checkpoint in the format of transformers."""
        trust = self._settings.trust_remote_code
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        sees_images = _sees_images(config)
        if not sees_images and not _writes_text(config):
            raise EngineFailed(
                f"{path} is a {config.model_type}; this worker serves causal and vision-language "
                "models.",
                remedy="Choose another checkpoint.",
            )
        quantization.prepare(config)
        if self._bits:
            quantization.refuse_quantized(config, path)
        processor = None
        if sees_images:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
            tokenizer = processor.tokenizer
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        self._progress("loading the weights")
        network = self._weights(path, config, sees_images)
        image_token = getattr(processor, "image_token", None)
        return _Loaded(
            network=network,
            tokenizer=tokenizer,
            encode=_encoder(processor, tokenizer, network),
            apply_template=template_of(processor, tokenizer),
            image_token=image_token,
            image_token_id=None if image_token is None else _token_id(tokenizer, image_token),
        )

    def _weights(self, path: str, config: Any, sees_images: bool) -> Any:
        factory = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
        how: dict[str, Any] = {}
        if self._settings.use_flash_attn:  # else each model's best, as transformers chooses
            how["attn_implementation"] = self._attention
        if self._bits:
            how["quantization_config"] = self._quantization(factory, config)
        if self._bits or quantization.is_quantized(config):
            how["device_map"] = {"": self._device}  # what is quantized cannot be moved later
        network, report = factory.from_pretrained(
            path,
            config=config,
            dtype=self._dtype,
            trust_remote_code=self._settings.trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below, in a sentence
            output_loading_info=True,
            **how,
        )
        # transformers fills what is missing with random numbers and goes on.
        broken = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
        if broken:
            raise EngineFailed(
                f"The checkpoint {path} lacks {len(broken)} of its weights or has them in another "
                f"shape than its config says, {min(broken)} for one.",
                remedy="Download or export it again, complete.",
            )
        if not quantization.is_quantized(network.config):
            network = network.to(self._device)
        return network.eval()

    # ---- the whole

    def _model(
        self,
        loaded: _Loaded,
        network: Any,
        switchable: adapters.Adapters,
        default: str | None,
    ) -> HfModel:
        tokenizer = loaded.tokenizer
        ends = eos_ids(network.generation_config, network.config.get_text_config(), tokenizer)
        # A request means what it says: the checkpoint's own sampling defaults stay out of it.
        network.generation_config = GenerationConfig()
        apply_template, stops = self._template(loaded)
        width = network.get_output_embeddings().weight.shape[0]
        return HfModel(
            network=network,
            tokenizer=tokenizer,
            encode=loaded.encode,
            apply_template=apply_template,
            image_token=loaded.image_token,
            image_token_id=loaded.image_token_id,
            eos_ids=ends,
            stops=stops,
            vocab_size=min(network.get_input_embeddings().num_embeddings, width),
            context_length=_context_length(network.config, tokenizer),
            precision=quantization.precision(network),
            adapters=switchable,
            default_adapter=default,
            grammars=Grammars(
                tokenizer,
                logits_width=width,
                eos_ids=ends,
                never=() if loaded.image_token_id is None else (loaded.image_token_id,),
            ),
        )

    def _template(self, loaded: _Loaded) -> tuple[ApplyTemplate | None, tuple[str, ...]]:
        """The template that was asked for, LLaVA's for a checkpoint of its own, or what the
        checkpoint brings."""
        conversation = templates.choose(
            self._settings.conv_template,
            trained_with=loaded.conversation,
            guess=loaded.guess,
            brings_one=loaded.apply_template is not None,
        )
        if conversation is None:
            return loaded.apply_template, ()
        self._progress(f"conversation template {conversation.name}")
        loaded.encode = _with_special_tokens(loaded.encode)
        return templates.renderer(conversation, loaded.tokenizer), conversation.stops

    def _report_memory(self, network: Any) -> None:
        if self._bits is None:
            return
        before = quantization.weight_bytes_before(network)
        after = quantization.weight_bytes(network)
        self._progress(f"weights {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB")


def _with_special_tokens(encode: Encode) -> Encode:
    """LLaVA's templates leave the first token to the tokenizer."""
    return lambda text, _, pictures: encode(text, True, pictures)


def _encoder(processor: Any, tokenizer: Any, network: Any) -> Encode:
    """How a checkpoint in transformers' format reads text and pictures."""
    unwanted = {"attention_mask"}  # all ones
    if "token_type_ids" not in inspect.signature(network.forward).parameters:
        unwanted.add("token_type_ids")  # some tokenizers add them unasked

    def encode(text: str, add_special_tokens: bool, pictures: Sequence[Image.Image]) -> Inputs:
        if not pictures:
            ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": torch.tensor([ids], dtype=torch.long)}
        try:
            batch = processor(
                images=pictures_for(processor, pictures),
                text=text,
                add_special_tokens=add_special_tokens,
                return_tensors="pt",
            )
        except ValueError as exc:
            raise BadImage(
                f"The model's image processor refused an image: {one_line(exc)}",
                remedy="Send an image of a more usual size and shape.",
            ) from exc
        return {name: value for name, value in batch.items() if name not in unwanted}

    return encode


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


def _token_id(tokenizer: Any, token: str) -> int:
    token_id: int = tokenizer.convert_tokens_to_ids(token)
    return token_id


def _context_length(config: Any, tokenizer: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions:
        return int(positions)
    # A tokenizer that knows no length says 10**30.
    return int(min(tokenizer.model_max_length, UNLIMITED_TOKENS))


def _load_failure(settings: HfSettings, exc: Exception) -> EngineFailed:
    path = settings.model_path
    if is_out_of_memory(exc):
        return EngineFailed(
            f"There is not enough memory for {path}.",
            remedy="Choose a smaller model, --load-4bit, or another --device.",
        )
    for missing in (path, settings.model_base):
        if isinstance(exc, OSError) and missing is not None and not Path(missing).is_dir():
            return EngineFailed(
                f"The model {missing} is no directory here and cannot be fetched: {one_line(exc)}.",
                remedy="Give a directory, or the id of a model on the Hugging Face hub; "
                "with HF_HUB_OFFLINE=1 it must be in the local cache.",
            )
    return EngineFailed(
        f"The checkpoint {path} cannot be loaded: {one_line(exc)}.",
        remedy="Check that config, weights and tokenizer are complete and transformers' own; "
        "--log-level DEBUG shows the cause in full.",
    )
