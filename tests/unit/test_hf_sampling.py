"""workers.hf.sampling: what is drawn depends on seed and position alone, with the right odds.

pytest tests/unit/test_hf_sampling.py
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from protocol.messages import SamplingParams

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from workers.hf import sampling  # noqa: E402 - needs torch

LOGITS = [3.0, 2.0, 1.0, 0.0, -1.0, -20.0]


def draw(
    params: SamplingParams,
    logits: list[float] = LOGITS,
    *,
    prompt: tuple[int, ...] = (0,),
    answer: tuple[int, ...] = (),
) -> int:
    """The token an answer would get."""
    scores = torch.tensor([logits])
    one = sampling.Draw(params)
    one.penalize(scores[0], answer)
    tokens, sound = sampling.choose(scores, [one], [len(prompt) + len(answer) - 1])
    assert sound == [True]
    return tokens[0]


def drawn(**params: Any) -> set[int]:
    """All tokens 400 seeds come to."""
    return {draw(SamplingParams(seed=seed, **params)) for seed in range(400)}


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0}, {"min_p": 1}])
def test_greedy_is_the_likeliest_token(greedy: dict[str, float]) -> None:
    assert drawn(**greedy) == {0}


def test_no_temperature_overflows() -> None:
    assert drawn(temperature=1e-45) == {0}
    assert drawn(temperature=2e-6) == {0}


def test_odds_are_those_of_softmax() -> None:
    draws = 4000
    counts = Counter(draw(SamplingParams(seed=seed)) for seed in range(draws))
    expected = torch.tensor(LOGITS).softmax(-1).tolist()
    for token_id, odds in enumerate(expected):
        assert counts[token_id] / draws == pytest.approx(odds, abs=0.03)


def test_odds_along_the_positions_of_one_seed() -> None:
    draws = 4000
    one = sampling.Draw(SamplingParams(seed=7))
    scores = torch.tensor([LOGITS]).expand(draws, -1)
    tokens, _ = sampling.choose(scores, [one] * draws, range(draws))
    counts = Counter(tokens)
    expected = torch.tensor(LOGITS).softmax(-1).tolist()
    for token_id, odds in enumerate(expected):
        assert counts[token_id] / draws == pytest.approx(odds, abs=0.03)


# softmax(LOGITS) is .64, .23, .09, .03, .01, 0
@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 100, "top_p": 0.8}, {0, 1}),
        ({"top_p": 0.6}, {0}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"min_p": 0.1}, {0, 1, 2}),
        ({"min_p": 0.3}, {0, 1}),
        ({"top_p": 0.9, "temperature": 100.0}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 3, "min_p": 0.3}, {0, 1}),
    ],
)
def test_what_may_be_drawn(params: dict[str, float], tokens: set[int]) -> None:
    assert drawn(**params) == tokens


def murmur3(data: bytes) -> int:
    """MurmurHash3 of whole 4-byte blocks with seed 0, as published."""
    state = 0
    for start in range(0, len(data), 4):
        block = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 % 2**32
        block = (block << 15 | block >> 17) * 0x1B873593 % 2**32
        state ^= block
        state = ((state << 13 | state >> 19) * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return state ^ state >> 16


@pytest.mark.parametrize("seed", [0, 42, 0x1234_5678_9ABC_DEF0, 2**63 - 1])
def test_noise_is_sglangs(seed: int) -> None:
    """SGLang hashes seed (8 bytes), position (4) and token id (4)."""
    assert murmur3(b"test") == 0xBA6BD213
    tokens, position = 1000, 7
    hashes = [
        murmur3(struct.pack("<QII", seed, position - 1, token_id)) for token_id in range(tokens)
    ]
    noise = [-math.log(-math.log(value / 0xFFFFFFFF)) for value in hashes]
    one = sampling.Draw(SamplingParams(seed=seed))
    chosen, _ = sampling.choose(torch.zeros((1, tokens)), [one], [position - 1])
    assert chosen == [noise.index(max(noise))]


def test_the_same_draw_in_any_thread() -> None:
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1)).tolist()

    def sequence(_: int) -> list[int]:
        answer: tuple[int, ...] = ()
        for _step in range(20):
            answer += (draw(SamplingParams(seed=9), logits, answer=answer),)
        return list(answer)

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(sequence, range(4))
    assert others == [first] * 3
    assert len(set(first)) > 10


def test_rows_do_not_know_of_each_other() -> None:
    """Every row of a mixed batch gets the token it gets alone."""
    source = torch.Generator().manual_seed(2)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "top_k": 5},
        {"seed": 3, "top_p": 0.7, "temperature": 2.0},
        {"seed": 4, "min_p": 0.2},
        {"seed": 5, "top_k": 50, "top_p": 0.9, "temperature": 0.7},
    ]
    draws = [sampling.Draw(SamplingParams(**kind)) for kind in kinds * 3]
    scores = torch.randn((len(draws), 500), generator=source) * 3
    positions = list(range(len(draws)))
    together, _ = sampling.choose(scores, draws, positions)
    alone = [sampling.choose(scores[row : row + 1], [draws[row]], [row])[0][0] for row in positions]
    assert together == alone


@pytest.mark.parametrize("how", [{}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1}], ids=str)
def test_what_is_not_a_number_is_said_of_sampled_rows_too(how: dict[str, Any]) -> None:
    scores = torch.tensor([[1.0, 2.0], [float("nan"), float("nan")]])
    draws = [sampling.Draw(SamplingParams(temperature=0)), sampling.Draw(SamplingParams(**how))]
    tokens, sound = sampling.choose(scores, draws, [0, 0])
    assert sound == [True, False]
    assert tokens[0] == 1


def test_what_is_not_a_number_is_said_of_its_row_only() -> None:
    scores = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [2.0, 1.0]])
    tokens, sound = sampling.choose(
        scores, [sampling.Draw(SamplingParams(temperature=0))] * 3, [0, 0, 0]
    )
    assert sound == [True, False, True]
    assert (tokens[0], tokens[2]) == (1, 0)


def test_without_a_seed_draws_differ() -> None:
    assert len({draw(SamplingParams(), [0.0] * 1000) for _ in range(10)}) > 1


def test_the_repetition_penalty_looks_at_the_answer_only() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert draw(params, prompt=(0, 0, 0)) == 0
    assert draw(params, prompt=(0,), answer=(0,)) == 1


@pytest.mark.parametrize(
    ("penalties", "answer", "expected"),
    [
        ({"presence_penalty": 0.5}, (0, 0, 4), [2.5, 2, 1, 0, -1.5, -20]),
        ({"frequency_penalty": 0.5}, (0, 0, 4), [2, 2, 1, 0, -1.5, -20]),
        ({"presence_penalty": -2, "frequency_penalty": 1}, (0, 0, 0, 4), [2, 2, 1, 0, 0, -20]),
        # what is subtracted comes first: a score that falls below 0 is then multiplied
        ({"frequency_penalty": 2, "repetition_penalty": 2}, (0, 0, 1), [-2, 0, 1, 0, -1, -20]),
        ({"frequency_penalty": 2}, (), LOGITS),
    ],
    ids=str,
)
def test_openais_penalties(
    penalties: dict[str, Any], answer: tuple[int, ...], expected: list[float]
) -> None:
    scores = torch.tensor(LOGITS)
    sampling.Draw(SamplingParams(**penalties)).penalize(scores, answer)
    assert scores.tolist() == expected


def test_presence_counts_once_and_frequency_each_time() -> None:
    once, twice = (0,), (0, 0)
    presence = SamplingParams(temperature=0, presence_penalty=0.9)
    frequency = SamplingParams(temperature=0, frequency_penalty=0.9)
    assert [draw(presence, answer=answer) for answer in (once, twice)] == [0, 0]
    assert [draw(frequency, answer=answer) for answer in (once, twice)] == [0, 1]


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency"])
def test_a_penalized_answer_is_not_merely_the_likeliest(name: str) -> None:
    assert sampling.Draw(SamplingParams(**{f"{name}_penalty": 0.5})).penalizes  # type: ignore[arg-type]
    assert not sampling.Draw(SamplingParams()).penalizes
