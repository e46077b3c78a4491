"""Attention on a CPU for the whole batch at once.

SGLang's PyTorch attention goes from request to request in Python, in each layer. A step of 32
requests of a small model is then a thousand small operations, which take longer than the rest of
it. And for what follows a cached prefix it computes the attention of the prefix again, to throw it
away. Requests of about one length are decoded together here, and new tokens attend alone.

What is rare, cross-attention and sliding windows, stays with SGLang's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

from workers.sglang.server import imports
from workers.sglang.server.hooks import wrap

MODULE = "sglang.srt.layers.attention.torch_native_backend"

_POOL = ("query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens")
_DEFAULTS = {
    "encoder_lens": None,
    "scaling": None,
    "enable_gqa": False,
    "causal": False,
    "is_cross_attn": False,
    "sliding_window_size": None,
}
DECODE = ("self", *_POOL, *_DEFAULTS)
EXTEND = ("self", *_POOL, "extend_prefix_lens", "extend_seq_lens", *_DEFAULTS)


def install() -> None:
    """See to it that SGLang attends so; before it is imported."""
    imports.after(MODULE, adapt)


def adapt(module: ModuleType) -> None:
    """Have the backend of ``module`` compute whole batches.

    Raises:
        ChangedError: it has changed.
    """
    backend = module.TorchNativeAttnBackend
    wrap(backend, "_run_sdpa_forward_decode", DECODE, partial(_unless_rare, DECODE, _decode_batch))
    wrap(backend, "_run_sdpa_forward_extend", EXTEND, partial(_unless_rare, EXTEND, _extend_batch))


def _unless_rare(
    names: Sequence[str], compute: Callable[[Any], None], one_by_one: Callable[..., Any]
) -> Callable[..., Any]:
    """``compute`` with the arguments called ``names``, where a token sees all of its request up to
    itself and nothing else; ``one_by_one`` for the rest."""

    def attend(*args: Any, **named: Any) -> Any:
        given = SimpleNamespace(**_DEFAULTS | dict(zip(names, args, strict=False)) | named)
        window = given.sliding_window_size
        windowed = window is not None and window >= 0
        other = given.encoder_lens is not None or given.is_cross_attn
        both_ways = names is EXTEND and not given.causal  # a decoded token is the last anyway
        if windowed or other or both_ways:
            return one_by_one(*args, **named)
        compute(given)
        return given.output

    return attend


def of_like_length(lengths: Iterable[int]) -> list[list[int]]:
    """The places of ``lengths``, in groups whose longest is less than twice their shortest."""
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(place)
    return list(groups.values())


def decode(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    slots: Any,
    seq_lens: Any,
    *,
    scaling: float | None,
    enable_gqa: bool,
) -> Any:
    """Attention of one new token of each request.

    Args:
        query: [requests, heads, size].
        k_cache: [slots, key heads, size]; ``v_cache`` is likewise.
        slots: [requests, longest], where the tokens of each request are; any behind its end.
        seq_lens: [requests], each with its new token.

    Returns:
        [requests, heads, size].
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    seen = torch.arange(slots.shape[1]) < seq_lens[:, None]
    keys, values = (cache[slots].transpose(1, 2).to(query.dtype) for cache in (k_cache, v_cache))
    return scaled_dot_product_attention(
        query.unsqueeze(2),
        keys,
        values,
        attn_mask=seen[:, None, None],
        scale=scaling,
        enable_gqa=enable_gqa,
    ).squeeze(2)


def extend(
    query: Any, k_cache: Any, v_cache: Any, slots: Any, *, scaling: float | None, enable_gqa: bool
) -> Any:
    """Attention of the last tokens of one request, each to those before it and itself.

    Args:
        query: [new tokens, heads, size].
        k_cache: [slots, key heads, size]; ``v_cache`` is likewise.
        slots: [tokens], where the tokens of the request are, the new ones last.

    Returns:
        [new tokens, heads, size].
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    new, tokens = len(query), len(slots)
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new) if new < tokens else None
    keys, values = (cache[slots].transpose(0, 1).to(query.dtype) for cache in (k_cache, v_cache))
    return scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen,
        is_causal=seen is None,
        scale=scaling,
        enable_gqa=enable_gqa,
    )[0].transpose(0, 1)


def _decode_batch(given: Any) -> None:
    lengths = given.seq_lens.tolist()
    groups = of_like_length(lengths)
    for places in groups:
        rows = slice(None) if len(groups) == 1 else places
        longest = max(lengths[place] for place in places)
        given.output[rows] = decode(
            given.query[rows],
            given.k_cache,
            given.v_cache,
            given.req_to_token[given.req_pool_indices[rows], :longest],
            given.seq_lens[rows],
            scaling=given.scaling,
            enable_gqa=given.enable_gqa,
        )


def _extend_batch(given: Any) -> None:
    begin = 0
    requests = (given.req_pool_indices, given.seq_lens, given.extend_seq_lens)
    for index, length, new in zip(*(numbers.tolist() for numbers in requests), strict=True):
        rows = slice(begin, begin + new)
        given.output[rows] = extend(
            given.query[rows],
            given.k_cache,
            given.v_cache,
            given.req_to_token[index, :length],
            scaling=given.scaling,
            enable_gqa=given.enable_gqa,
        )
        begin += new
