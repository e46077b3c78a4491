"""workers.sglang.server.cpu.attention: for whole batches what SGLang computes one by one.

pytest tests/unit/test_sglang_attention.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from workers.sglang.server.cpu import attention
from workers.sglang.server.hooks import ChangedError

torch = pytest.importorskip("torch")

SIZE, SLOTS = 8, 400
Heads = tuple[int, int]  # of queries, of keys


class Pool:
    """A cache of random tokens, and requests whose tokens lie anywhere in it."""

    def __init__(self, lengths: Sequence[int], heads: Heads) -> None:
        torch.manual_seed(0)
        self.keys, self.values = (torch.randn(SLOTS, heads[1], SIZE) for _ in range(2))
        self.rows = torch.randperm(len(lengths) + 2)[: len(lengths)]
        self.req_to_token = torch.randint(0, SLOTS, (len(lengths) + 2, max(lengths) + 50))
        self.lengths = torch.tensor(lengths)

    def plain(self, place: int, query: Any) -> Any:
        """Attention by its formula, in float64: [new, heads, size] of request ``place``."""
        length = int(self.lengths[place])
        slots = self.req_to_token[self.rows[place], :length]
        grouped = query.shape[1] // self.keys.shape[1]
        keys, values = (
            cache[slots].double().repeat_interleave(grouped, dim=1)
            for cache in (self.keys, self.values)
        )
        scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * 0.5
        late = torch.arange(length) > torch.arange(length - len(query), length)[:, None]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(late, -1e9).softmax(-1), values)


def adapted(one_by_one: Callable[..., Any]) -> Any:
    """A backend as SGLang has it, whose own functions are ``one_by_one``."""

    class TorchNativeAttnBackend:
        def _run_sdpa_forward_decode(
            self, query: Any, output: Any, k_cache: Any, v_cache: Any, req_to_token: Any,
            req_pool_indices: Any, seq_lens: Any, encoder_lens: Any = None, scaling: Any = None,
            enable_gqa: Any = False, causal: Any = False, is_cross_attn: Any = False,
            sliding_window_size: Any = None,
        ) -> Any:  # fmt: skip
            return one_by_one(encoder_lens, causal, is_cross_attn, sliding_window_size)

        def _run_sdpa_forward_extend(
            self, query: Any, output: Any, k_cache: Any, v_cache: Any, req_to_token: Any,
            req_pool_indices: Any, seq_lens: Any, extend_prefix_lens: Any, extend_seq_lens: Any,
            encoder_lens: Any = None, scaling: Any = None, enable_gqa: Any = False,
            causal: Any = False, is_cross_attn: Any = False, sliding_window_size: Any = None,
        ) -> Any:  # fmt: skip
            return one_by_one(encoder_lens, causal, is_cross_attn, sliding_window_size)

    attention.adapt(SimpleNamespace(TorchNativeAttnBackend=TorchNativeAttnBackend))  # type: ignore[arg-type]
    return TorchNativeAttnBackend()


def never(*_: Any) -> Any:
    raise AssertionError("one by one")


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [1, 2, 3, 250, 129, 64, 255, 5]])
def test_decode(lengths: list[int], heads: Heads) -> None:
    pool = Pool(lengths, heads)
    query = torch.randn(len(lengths), heads[0], SIZE)
    output = torch.full_like(query, torch.nan)
    cache = (pool.keys, pool.values, pool.req_to_token, pool.rows, pool.lengths)
    adapted(never)._run_sdpa_forward_decode(
        query, output, *cache, None, scaling=0.5, enable_gqa=heads[0] != heads[1]
    )
    for place in range(len(lengths)):
        wanted = pool.plain(place, query[place : place + 1])[0]
        assert torch.allclose(output[place].double(), wanted, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("prefixes", [[0], [0, 3, 200], [31, 0, 1]])
def test_extend(prefixes: list[int], heads: Heads) -> None:
    new = [5 + 7 * place for place in range(len(prefixes))]
    lengths = [a + b for a, b in zip(prefixes, new, strict=True)]
    pool = Pool(lengths, heads)
    query = torch.randn(sum(new), heads[0], SIZE)
    output = torch.full_like(query, torch.nan)
    cache = (pool.keys, pool.values, pool.req_to_token, pool.rows, pool.lengths)
    adapted(never)._run_sdpa_forward_extend(
        *(query, output, *cache, torch.tensor(prefixes), torch.tensor(new), None),
        scaling=0.5,
        enable_gqa=heads[0] != heads[1],
        causal=True,
    )
    wanted = [pool.plain(place, part) for place, part in enumerate(query.split(new))]
    assert torch.allclose(output.double(), torch.cat(wanted), atol=1e-5)


def test_what_is_rare_is_left_to_sglang() -> None:
    pool = Pool([3], (2, 2))
    query = torch.randn(1, 2, SIZE)
    cache = (query, query, pool.keys, pool.values, pool.req_to_token, pool.rows, pool.lengths)
    backend = adapted(lambda *how: how)
    one = torch.tensor([1])
    for how in (
        {"encoder_lens": one, "causal": False, "is_cross_attn": False, "sliding_window_size": None},
        {"encoder_lens": None, "causal": False, "is_cross_attn": True, "sliding_window_size": None},
        {"encoder_lens": None, "causal": True, "is_cross_attn": False, "sliding_window_size": 16},
    ):
        wanted = tuple(how.values())
        assert backend._run_sdpa_forward_decode(*cache, **how) == wanted
        assert backend._run_sdpa_forward_extend(*cache, one, one, **how) == wanted
    both_ways = backend._run_sdpa_forward_extend(*cache, one, one, None, causal=False)
    assert both_ways == (None, False, False, None)


def test_a_backend_that_has_changed_is_told() -> None:
    class TorchNativeAttnBackend:
        def _run_sdpa_forward_decode(self, query: Any, output: Any) -> None: ...

    with pytest.raises(ChangedError, match="_run_sdpa_forward_decode"):
        attention.adapt(SimpleNamespace(TorchNativeAttnBackend=TorchNativeAttnBackend))  # type: ignore[arg-type]


def test_groups_hold_lengths_that_are_alike() -> None:
    assert attention.of_like_length([5, 900, 7, 4, 600, 1]) == [[0, 2, 3], [1, 4], [5]]
    for group in attention.of_like_length(range(1, 300)):
        assert max(group) + 1 < 2 * (min(group) + 1)
