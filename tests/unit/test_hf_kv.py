"""workers.hf.kv: rows of different lengths in one buffer, as transformers' cache sees them.

pytest tests/unit/test_hf_kv.py
"""

from __future__ import annotations

import torch

from workers.hf.kv import KvRows

HEADS, DIM, LAYERS = 2, 4, 3


def states(tokens: int, *values: float) -> torch.Tensor:
    """Keys of ``tokens`` tokens for each row, all numbers of a row alike."""
    rows = torch.tensor(values or (1.0,), dtype=torch.float32)[:, None, None, None]
    return rows.expand(-1, HEADS, tokens, DIM).clone()


def filled(*lengths: int) -> KvRows:
    """Row n holds ``lengths[n]`` tokens of the number n + 1."""
    kv = KvRows()
    for row, length in enumerate(lengths):
        kv.ensure(row + 1, length)
        cache = kv.one(row, 0, length)
        for layer in range(LAYERS):
            cache.update(states(length, row + 1), -states(length, row + 1), layer)
    return kv


def row(kv: KvRows, number: int, length: int) -> torch.Tensor:
    """The first head's keys of a row."""
    cache = kv.one(number, length - 1, 1)
    last = kv.layer(0, states(1), states(1)).keys[number, 0, length - 1].clone()
    keys, _ = cache.update(last.expand(1, HEADS, 1, DIM), states(1), 0)
    return keys[0, 0, :, 0]


def test_a_prompt_in_pieces_is_seen_whole() -> None:
    kv = KvRows()
    kv.ensure(1, 5)
    kv.one(0, 0, 3).update(states(3, 7.0), states(3, 7.0), 0)
    cache = kv.one(0, 3, 2)
    assert cache.get_seq_length() == 3
    assert cache.get_mask_sizes(2, 0) == (5, 0)
    keys, values = cache.update(states(2, 8.0), states(2, 9.0), 0)
    assert keys.shape == (1, HEADS, 5, DIM)
    assert keys[0, 0, :, 0].tolist() == [7, 7, 7, 8, 8]
    assert values[0, 0, :, 0].tolist() == [7, 7, 7, 9, 9]


def test_a_step_writes_behind_each_row() -> None:
    kv = filled(2, 5, 3)
    kv.ensure(3, 6)
    cache = kv.all(torch.tensor([2, 5, 3]), 5)
    assert cache.get_mask_sizes(1, 0) == (6, 0)
    keys, _ = cache.update(states(1, 10.0, 20.0, 30.0), states(1, 0.0, 0.0, 0.0), 0)
    assert keys.shape == (3, HEADS, 6, DIM)
    assert keys[:, 0, :, 0].tolist() == [
        [1, 1, 10, 0, 0, 0],
        [2, 2, 2, 2, 2, 20],
        [3, 3, 3, 30, 0, 0],
    ]


def test_growing_keeps_what_is_there() -> None:
    kv = filled(2, 5)
    kv.ensure(9, 1000)
    assert row(kv, 0, 2).tolist() == [1, 1]
    assert row(kv, 1, 5).tolist() == [2] * 5


def test_a_moved_row_leaves_nothing_of_the_one_before() -> None:
    kv = filled(5, 2)
    kv.move(1, 0, 2)
    kv.clear(1)
    assert row(kv, 0, 5).tolist() == [2, 2, 0, 0, 0]
    assert row(kv, 1, 2).tolist() == [0, 0]


def test_rows_that_were_never_made_can_be_cleared() -> None:
    kv = filled(2)
    kv.clear(40)
    kv.move(40, 0, 0)
    assert row(kv, 0, 2).tolist() == [0, 0]


def test_what_is_no_longer_needed_is_given_back() -> None:
    kv = filled(2, 5, 900, 3, 3)
    large = kv.size_bytes
    kv.settle(4, 900)
    assert kv.size_bytes == large, "half of it is not worth a copy"
    kv.settle(2, 5)
    assert kv.size_bytes < large / 8
    assert row(kv, 0, 2).tolist() == [1, 1]
    assert row(kv, 1, 5).tolist() == [2] * 5
    kv.settle(0, 0)
    assert kv.size_bytes == 0


def test_released_memory_is_gone() -> None:
    kv = filled(3, 3)
    assert kv.size_bytes > 0
    assert kv.bytes_of(4, 128) == 2 * kv.size_bytes
    kv.release()
    assert kv.size_bytes == 0
