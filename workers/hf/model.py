"""A loaded checkpoint, as everything that computes with it sees it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from protocol.messages import BASE
from workers.grammar import Grammars
from workers.hf.adapters import Adapters
from workers.prompts import ApplyTemplate

Inputs = dict[str, torch.Tensor]
"""Tensors on the CPU with a batch dimension of 1; ``input_ids`` [1, tokens] is always there."""

Encode = Callable[[str, bool, Sequence[Image.Image]], Inputs]
"""Text, whether to add special tokens, and upright RGB pictures, to what the network takes; called
from several threads. Tokenizers allow that as long as padding and truncation are never set."""


@dataclass(frozen=True)
class HfModel:
    """One network with what turns requests into its inputs and its tokens into text."""

    network: Any
    tokenizer: Any
    encode: Encode
    apply_template: ApplyTemplate | None
    image_token: str | None
    image_token_id: int | None
    eos_ids: frozenset[int]
    stops: tuple[str, ...]  # end every answer, as a legacy template says
    vocab_size: int
    context_length: int  # tokens
    precision: str
    adapters: Adapters
    default_adapter: str | None  # of requests that name none
    grammars: Grammars

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Those a request may choose; ``BASE`` where another is the default."""
        names = self.adapters.names
        return names if self.default_adapter is None else (BASE, *names)

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that answers a request for ``name``; ``None``: the weights as they are."""
        return self.default_adapter if name is None else None if name == BASE else name

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.device
        return device

    @property
    def exact(self) -> bool:
        """Whether a token's numbers are the same from a prompt's pass and from a decode step."""
        return self.precision == "float32"

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The names ``network.forward`` takes."""
        return frozenset(inspect.signature(self.network.forward).parameters)

    def spell(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` as an answer shows it."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
