"""Attention on a CPU for the whole batch at once.

SGLang's PyTorch attention goes from request to request in Python, in each layer. A step of 32
requests of a small model is then a thousand small operations, which take longer than the rest of
it. And for what follows a cached prefix it computes the attention of the prefix again, to throw it
away. Requests of about one length are decoded together here, and new tokens attend alone.

What is rare, cross-attention and sliding windows, stays with SGLang's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from workers.sglang.server import imports
from workers.sglang.server.hooks import wrap

MODULE = "sglang.srt.layers.attention.torch_native_backend"

_POOL = ("query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens")
_HOW = ("encoder_lens", "scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size")
DECODE = ("self", *_POOL, *_HOW)
EXTEND = ("self", *_POOL, "extend_prefix_lens", "extend_seq_lens", *_HOW)


def install() -> None:
    """See to it that SGLang attends so; before it is imported."""
    imports.after(MODULE, adapt)


def adapt(module: ModuleType) -> None:
    """Have the backend of ``module`` compute whole batches.

    Raises:
        ChangedError: it has changed.
    """
    backend = module.TorchNativeAttnBackend
    wrap(backend, "_run_sdpa_forward_decode", DECODE, _decoding)
    wrap(backend, "_run_sdpa_forward_extend", EXTEND, _extending)


def _usual(encoder_lens: Any, is_cross_attn: bool, window: int | None) -> bool:
    """Whether each token sees all of its request before it, and nothing else."""
    return encoder_lens is None and not is_cross_attn and (window is None or window < 0)


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


def _decoding(one_by_one: Callable[..., Any]) -> Callable[..., Any]:
    def decode_batch(
        self: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        encoder_lens: Any = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Any:
        pool = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        how: dict[str, Any] = {"scaling": scaling, "enable_gqa": enable_gqa}
        if not _usual(encoder_lens, is_cross_attn, sliding_window_size):
            return one_by_one(
                *(self, query, output, *pool, encoder_lens),
                **how,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
        lengths = seq_lens.tolist()
        groups = of_like_length(lengths)
        for places in groups:
            rows = slice(None) if len(groups) == 1 else places
            longest = max(lengths[place] for place in places)
            slots = req_to_token[req_pool_indices[rows], :longest]
            output[rows] = decode(query[rows], k_cache, v_cache, slots, seq_lens[rows], **how)
        return output

    return decode_batch


def _extending(one_by_one: Callable[..., Any]) -> Callable[..., Any]:
    def extend_batch(
        self: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        extend_prefix_lens: Any,
        extend_seq_lens: Any,
        encoder_lens: Any = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Any:
        how: dict[str, Any] = {"scaling": scaling, "enable_gqa": enable_gqa}
        if not causal or not _usual(encoder_lens, is_cross_attn, sliding_window_size):
            pool = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
            return one_by_one(
                *(self, query, output, *pool, extend_prefix_lens, extend_seq_lens, encoder_lens),
                **how,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
        begin = 0
        for index, length, new in zip(
            req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True
        ):
            rows = slice(begin, begin + new)
            slots = req_to_token[index, :length]
            output[rows] = extend(query[rows], k_cache, v_cache, slots, **how)
            begin += new
        return output

    return extend_batch
