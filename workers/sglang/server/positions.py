"""Where the tokens of a prompt with pictures are for Qwen-VL, which gives each three positions."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def of_pictures(length: int, pictures: Iterable[tuple[int, int, int]]) -> torch.Tensor:
    """Time, row and column of ``length`` tokens: [3, length], as transformers counts them.

    ``pictures`` are the first token, the rows and the columns of each, in order. A picture is one
    moment; what follows it goes on behind its longer side.

    Raises:
        ValueError: a picture begins inside the one before it, or does not end with the prompt.
    """
    parts: list[torch.Tensor] = []
    position = place = 0
    for start, rows, columns in pictures:
        if not place <= start <= length - rows * columns:
            raise ValueError("The pictures of the prompt are not where their tokens are.")
        parts.append(_text(start - place, position))
        position += start - place
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        parts.append(grid.T + position)
        position += max(rows, columns)
        place = start + rows * columns
    parts.append(_text(length - place, position))
    return torch.cat(parts, dim=1)


def _text(length: int, position: int) -> torch.Tensor:
    return torch.arange(position, position + length).expand(3, -1)
