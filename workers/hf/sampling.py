"""Drawing tokens so that (seed, position) alone decide, whatever other threads do meanwhile.

``torch.manual_seed`` is shared by all threads, so two seeded requests at once disturb each other.
Here the noise of a draw is a hash of the seed, the position and the token: no state, equal on
every device, and equal after a resume elsewhere. Hash and formula are those of SGLang's
deterministic mode, so that equal logits give equal draws there.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from protocol.messages import SamplingParams

GREEDY_BELOW = 1e-6
"""Temperatures below are greedy, as in SGLang; dividing by them would overflow."""

_U32 = 0xFFFFFFFF


def processors(params: SamplingParams, *, prompt_tokens: int) -> Any:
    """The ``logits_processor`` of ``generate(do_sample=False)`` that samples by ``params``.

    The repetition penalty looks at the answer only, as SGLang's does.
    """
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(
            RepetitionPenaltyLogitsProcessor(
                params.repetition_penalty, prompt_ignore_length=prompt_tokens
            )
        )
    if params.temperature < GREEDY_BELOW:
        return chain
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        chain.append(MinPLogitsWarper(params.min_p))
    chain.append(SeededDraw(secrets.randbits(63) if params.seed is None else params.seed))
    return chain


class SeededDraw:
    """Draws one token by the Gumbel-max method and leaves it alone in the scores."""

    def __init__(self, seed: int) -> None:
        self._seed_state = _mix(_mix(0, seed & _U32), seed >> 32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Only what the warpers left over: with top-k that is a few of 150 000.
        candidates = torch.isfinite(scores[0]).nonzero().squeeze(1)
        noise = gumbel(_mix(self._seed_state, input_ids.shape[1] - 1), candidates)
        drawn = candidates[(scores[0, candidates].double() + noise).argmax()]
        alone = torch.full_like(scores, float("-inf"))
        alone[0, drawn] = 0.0
        return alone


def gumbel(state: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of each token id, from the murmur3 ``state`` of seed and position."""
    mixed = _mix(state, token_ids.long()) ^ 16  # bytes hashed
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _U32
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & _U32
    uniform = (mixed ^ (mixed >> 16)).double() / _U32
    # Both ends are cut, so that a hash of all ones or all zeros is not infinitely likely.
    lowest = torch.finfo(torch.float64).min
    exponential = -uniform.log().clamp(min=lowest, max=-(2.0**-32))
    return -exponential.log()


def _mix(state: int, block: Any) -> Any:
    """One round of murmur3 on 32-bit numbers: ints, or int64 tensors whose overflow is cut off."""
    block = (block * 0xCC9E2D51) & _U32
    block = ((block << 15) | (block >> 17)) & _U32
    block = (block * 0x1B873593) & _U32
    mixed = state ^ block
    mixed = ((mixed << 13) | (mixed >> 19)) & _U32
    return (mixed * 5 + 0xE6546B64) & _U32
