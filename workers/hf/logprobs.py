"""Log probabilities of chosen tokens, as the wire carries them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from protocol.events import TokenLogprob
from workers.logprobs import token_logprob


def logprobs_of(
    scores: torch.Tensor, token_id: int, top: int, decode: Callable[[list[int]], str]
) -> TokenLogprob:
    """How likely ``token_id`` was by the network's own ``scores`` ``[V]``, on any device.

    ``decode`` gives the text of ids, special tokens included. Take ``scores`` before a sampler or
    a grammar changes them in place.
    """
    logs = scores.float().log_softmax(-1)
    values, ids = logs.topk(min(top, len(logs)))
    # One transfer: each costs a synchronisation on an accelerator.
    chosen, *likeliest = torch.cat([logs[token_id, None], values]).tolist()
    return token_logprob(token_id, chosen, zip(ids.tolist(), likeliest, strict=True), decode)
