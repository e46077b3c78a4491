"""Placeholders of images among token ids; plain functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def runs(ids: Sequence[int], placeholder: int) -> list[int]:
    """The lengths of the runs of ``placeholder`` in ``ids``."""
    return [len(list(run)) for token_id, run in groupby(ids) if token_id == placeholder]


def expand(
    ids: Sequence[int], placeholder: int, counts: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Repeat the n-th ``placeholder`` of ``ids`` ``counts[n]`` times.

    Returns the ids and where each run is: its first and its last index.

    Raises:
        ValueError: there are not as many of them as counts.
    """
    if ids.count(placeholder) != len(counts):
        raise ValueError(
            f"The prompt has {ids.count(placeholder)} image placeholders for {len(counts)} images."
        )
    remaining = iter(counts)
    expanded: list[int] = []
    offsets: list[tuple[int, int]] = []
    for token_id in ids:
        if token_id == placeholder:
            start = len(expanded)
            expanded += [placeholder] * next(remaining)
            offsets.append((start, len(expanded) - 1))
        else:
            expanded.append(token_id)
    return expanded, offsets
