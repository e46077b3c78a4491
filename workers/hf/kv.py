"""Keys and values of many answers in one buffer, a row each.

transformers' own ``DynamicCache`` holds one batch whose rows have one length, and copies all of it
with every token. Here rows begin and end at any time: a prompt is computed straight into its row,
a token is written behind its own row's last one, and nothing else is copied. What lies behind a
row's end is hidden by the attention mask. A row's length is counted by its owner, after the
network has returned, so a pass that failed half way can simply be made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import Cache

_COLUMNS_STEP = 128
"""Tokens by which rows get longer; the number of rows doubles."""

_SETTLE_AT = 4
"""How many times larger than needed the buffer may be."""


class KvRows:
    """Per layer two tensors ``[rows, heads, columns, head_dim]``, made when first written."""

    def __init__(self) -> None:
        self._layers: list[_Layer] = []
        self._rows = 0
        self._columns = 0

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self._layers)

    def bytes_of(self, rows: int, columns: int) -> int:
        """What the buffer takes once it is ensured for so many; 0 before anything is written."""
        area = self._rows * self._columns
        wanted = max(self._rows, _row_count(rows)) * max(self._columns, _column_count(columns))
        return self.size_bytes * wanted // area if area else 0

    def ensure(self, rows: int, columns: int) -> None:
        """Make room; blocking, copies when it grows.

        Raises:
            RuntimeError, torch.OutOfMemoryError: there is no memory; what was there still is.
        """
        rows = max(self._rows, _row_count(rows))
        columns = max(self._columns, _column_count(columns))
        if (rows, columns) == (self._rows, self._columns):
            return
        for layer in self._layers:
            layer.resize(rows, columns)
        self._rows, self._columns = rows, columns

    def settle(self, rows: int, columns: int) -> None:
        """Give back what the first ``rows`` of at most ``columns`` tokens need no longer, if it is
        most of it."""
        kept = _row_count(rows), _column_count(columns)
        if not rows:
            self.release()
        elif kept[0] * kept[1] * _SETTLE_AT <= self._rows * self._columns:
            for layer in self._layers:
                layer.resize(*kept)
            self._rows, self._columns = kept

    def one(self, row: int, length: int, tokens: int) -> Cache:
        """The cache of a pass over ``tokens`` more tokens of ``row``, which has ``length``."""
        columns = slice(length, length + tokens)
        index = (row, slice(None), columns)
        return _View(self, index, rows=slice(row, row + 1), length=length, columns=columns.stop)

    def all(self, lengths: torch.Tensor, longest: int) -> Cache:
        """The cache of a pass over one more token of each of the first rows, ``lengths`` [rows]."""
        rows = len(lengths)
        index = (torch.arange(rows, device=lengths.device), slice(None), lengths)
        return _View(self, index, rows=slice(rows), length=longest, columns=longest + 1)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the ``length`` tokens of one row to another and clear the rest of that one."""
        if length == 0:  # the source need not have been made yet
            self.clear(target)
            return
        for layer in self._layers:
            for buffer in (layer.keys, layer.values):
                buffer[target, :, :length] = buffer[source, :, :length]
                buffer[target, :, length:] = 0

    def clear(self, row: int) -> None:
        """Forget a row: a masked column counts for nothing, unless it holds NaN."""
        for layer in self._layers:
            layer.keys[row : row + 1] = 0  # a slice: the row need not have been made yet
            layer.values[row : row + 1] = 0

    def release(self) -> None:
        """Give the memory back."""
        self._layers.clear()
        self._rows = self._columns = 0

    def layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> _Layer:
        """The layer for such ``keys`` and ``values``; layers are written in order."""
        if index == len(self._layers):
            size = (self._rows, self._columns)
            self._layers.append(_Layer(_zeros(keys, size), _zeros(values, size)))
        return self._layers[index]


class _Layer:
    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values

    @property
    def size_bytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)

    def resize(self, rows: int, columns: int) -> None:
        """To this size; negative padding cuts off, and what is cut off is not held any more."""
        old_rows, _, old_columns, _ = self.keys.shape
        if (old_rows, old_columns) == (rows, columns):  # grown by a call that failed later
            return
        more = (0, 0, 0, columns - old_columns, 0, 0, 0, rows - old_rows)
        keys, values = functional.pad(self.keys, more), functional.pad(self.values, more)
        self.keys, self.values = keys, values


class _View(Cache):
    """What one pass of the network sees and writes: the ``layers`` of transformers are not used."""

    def __init__(
        self, store: KvRows, index: tuple[Any, ...], *, rows: slice, length: int, columns: int
    ) -> None:
        super().__init__(layers=[])
        self._store = store
        self._index = index
        self._rows = rows
        self._length = length
        self._columns = columns

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._store.layer(layer_idx, key_states, value_states)
        single = isinstance(self._index[0], int)
        layer.keys[self._index] = key_states[0] if single else key_states[:, :, 0]
        layer.values[self._index] = value_states[0] if single else value_states[:, :, 0]
        seen = (self._rows, slice(None), slice(self._columns))
        return layer.keys[seen], layer.values[seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._columns, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


def _row_count(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


def _column_count(columns: int) -> int:
    return -(-columns // _COLUMNS_STEP) * _COLUMNS_STEP


def _zeros(like: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = size
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])
