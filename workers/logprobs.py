"""Log probabilities as the wire carries them; the same for every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from protocol.events import TokenLogprob, TopLogprob


def token_logprob(
    token_id: int,
    logprob: float,
    likeliest: Iterable[tuple[int, float]],
    spell: Callable[[list[int]], str],
) -> TokenLogprob:
    """The entry of a chosen token, with the ``likeliest`` ids and values at its place.

    ``spell`` gives the text of ids, special tokens included.
    """
    return TokenLogprob(
        token_id=token_id,
        token=spell([token_id]),
        logprob=logprob,
        top=tuple(
            TopLogprob(token_id=other, token=spell([other]), logprob=value)
            for other, value in likeliest
        ),
    )
