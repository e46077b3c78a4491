"""Choosing tokens so that (seed, position) alone decide, whatever else is in the batch.

``torch.manual_seed`` is shared by everything in the process, so two seeded requests at once
disturb each other. Here the noise of a draw is a hash of the seed, the position and the token: no
state, equal on every device, and equal after a resume elsewhere. Hash, formula and the meaning of
top_k, top_p and min_p are those of SGLang, so that equal logits give equal draws there.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from protocol.messages import SamplingParams

GREEDY_BELOW = 1e-6
"""Temperatures below are greedy, as in SGLang; dividing by them would overflow."""

_U32 = 0xFFFFFFFF


class Draw:
    """How the tokens of one answer are chosen."""

    def __init__(self, params: SamplingParams) -> None:
        self.greedy = params.temperature < GREEDY_BELOW
        self.temperature = params.temperature
        self.top_k = params.top_k
        self.top_p = params.top_p
        self.min_p = params.min_p
        self.repetition_penalty = params.repetition_penalty
        self.presence_penalty = params.presence_penalty
        self.frequency_penalty = params.frequency_penalty
        self.additive = params.presence_penalty != 0 or params.frequency_penalty != 0
        self.penalizes = self.additive or params.repetition_penalty != 1
        self.narrows = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._seed_state = _mix(_mix(0, seed & _U32), seed >> 32)

    def state(self, position: int) -> int:
        """The hash of the seed and of the token's position behind the prompt's first."""
        state: int = _mix(self._seed_state, position)
        return state

    def penalize(self, scores: torch.Tensor, answer_ids: Sequence[int]) -> None:
        """Apply the penalties to ``scores`` [vocabulary] in place.

        They look at the answer only, as SGLang's do, and in its order: what is subtracted first
        (OpenAI's formula), then the repetition penalty (Keskar et al. 2019, CTRL, 4.1).
        """
        if not self.penalizes or not answer_ids:
            return
        counts = Counter(answer_ids)
        seen = torch.tensor(list(counts), device=scores.device)
        at = scores[seen]
        if self.additive:
            times = torch.tensor(list(counts.values()), dtype=at.dtype, device=at.device)
            at = at - (self.frequency_penalty * times + self.presence_penalty)
        repetition = self.repetition_penalty
        scores[seen] = torch.where(at < 0, at * repetition, at / repetition)


def choose(
    scores: torch.Tensor, draws: Sequence[Draw], positions: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """A token for each row of ``scores`` [rows, vocabulary] (float32), and whether it is sound.

    A row is unsound when the network gave it something that is not a number.
    """
    if scores.device.type == "mps":  # it knows no float64
        scores = scores.cpu()
    best, tokens = scores.max(dim=-1)
    sampled = [row for row, draw in enumerate(draws) if not draw.greedy]
    if sampled:
        which = slice(None) if len(sampled) == len(draws) else sampled
        drawn = _draw(scores[which], [draws[r] for r in sampled], [positions[r] for r in sampled])
        tokens[which] = drawn
    return tokens.tolist(), torch.isfinite(best).tolist()


def _draw(scores: torch.Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> torch.Tensor:
    """One token a row by the Gumbel-max method, from what top_k, top_p and min_p leave."""
    column = _column_on(scores.device)
    logits = scores / column([draw.temperature for draw in draws])
    if any(draw.narrows for draw in draws):
        candidates, ids = logits.sort(dim=-1, descending=True, stable=True)
        share = candidates.softmax(dim=-1)
        before = share.cumsum(dim=-1) - share
        width = share.shape[-1]
        keep = torch.arange(width, device=scores.device) < column(
            [draw.top_k or width for draw in draws]
        )
        keep &= before <= column([draw.top_p for draw in draws])
        keep &= share >= share[:, :1] * column([draw.min_p for draw in draws])
        kept = max(1, int(keep.sum(dim=-1).max()))  # none, where nothing is a number
        candidates, ids, keep = candidates[:, :kept], ids[:, :kept], keep[:, :kept]
        candidates = candidates.masked_fill(~keep, float("-inf"))
    else:
        candidates = logits
        ids = torch.arange(logits.shape[-1], device=scores.device)[None]
    states = column([draw.state(at) for draw, at in zip(draws, positions, strict=True)])
    pick = (candidates.double() + gumbel(states, ids)).argmax(dim=-1, keepdim=True)
    return ids.expand_as(candidates).gather(1, pick).squeeze(1)


def _column_on(device: torch.device) -> Any:
    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None]

    return column


def gumbel(states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of each token id, from the murmur3 ``states`` of seed and position."""
    mixed = _mix(states, token_ids.long()) ^ 16  # bytes hashed
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _U32
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & _U32
    uniform = (mixed ^ (mixed >> 16)).double() / _U32
    # Both ends are cut, so that a hash of all ones or all zeros is not infinitely likely.
    lowest = torch.finfo(torch.float64).min
    exponential = -uniform.log().clamp(min=lowest, max=-(2.0**-32))
    return -exponential.log()


def _mix(state: Any, block: Any) -> Any:
    """One round of murmur3 on 32-bit numbers: ints, or int64 tensors whose overflow is cut off."""
    block = (block * 0xCC9E2D51) & _U32
    block = ((block << 15) | (block >> 17)) & _U32
    block = (block * 0x1B873593) & _U32
    mixed = state ^ block
    mixed = ((mixed << 13) | (mixed >> 19)) & _U32
    return (mixed * 5 + 0xE6546B64) & _U32
