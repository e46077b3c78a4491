"""The arithmetic of ``python -m bench.sglang``, and the prompts both kinds are asked."""

from __future__ import annotations

import json
from collections import Counter

import orjson
import pytest

from bench.client import Answer
from bench.prompts import prompts
from bench.rates import Measured
from bench.sglang import direct, parity
from bench.sglang.__main__ import as_it_must_be, parse
from bench.sglang.speed import figures


def frame(tokens: int, reason: str | None = None) -> bytes:
    finish = None if reason is None else {"type": reason}
    body = {"meta_info": {"completion_tokens": tokens, "finish_reason": finish}}
    return b"data: " + orjson.dumps(body) + b"\n\n"


def test_tokens_of_sglangs_stream_get_the_time_they_came() -> None:
    whole = frame(1) + frame(3) + frame(4, "length") + b"data: [DONE]\n\n"
    cut = len(frame(1)) + 5  # in the middle of a frame
    got = direct.answer_of([(1.0, whole[:cut]), (2.0, whole[cut:])], sent_at=0.5)
    assert got.token_at == (1.0, 2.0, 2.0, 2.0)
    assert (got.end, got.ttft_s) == ("length", 0.5)


def test_sglangs_error_is_no_answer() -> None:
    got = direct.answer_of([(1.0, b'data: {"error": {"message": "no"}}\n\n')], sent_at=0.0)
    assert got.end == "error"
    assert "no" in got.message
    assert direct.answer_of([(1.0, frame(1))], sent_at=0.0).end == "cut"


def test_ratios_are_taken_within_a_round() -> None:
    def at(rate: float, cpu_s: float) -> tuple[Measured, dict[str, float]]:
        return Measured(rate, rate / 2, (0.1,), tokens=10, short=0, failed=0), {"worker": cpu_s}

    rounds = [
        {(8, "a"): at(100, 0.02), (8, "b"): at(50, 0.01), (1, "a"): at(10, 0), (1, "b"): at(40, 0)},
        {(8, "a"): at(20, 0.04), (8, "b"): at(10, 0.01), (1, "a"): at(10, 0), (1, "b"): at(40, 0)},
    ]
    found = figures(rounds, ("a", "b"))
    assert found["levels"]["8"]["ratio"] == {"median": 2, "min": 2, "max": 2}
    assert found["levels"]["8"]["a"]["cpu_ms_per_token"]["worker"] == pytest.approx(3)
    assert found["best_to_best"] == pytest.approx(30 / 20)


def answer(*ids: int, end: str = "stop", tops: tuple[dict[int, float], ...] = ()) -> Answer:
    chosen = tuple(top[token] for token, top in zip(ids, tops, strict=False))
    return Answer(end=end, token_ids=ids, text=str(ids), logprobs=chosen, likeliest=tops)


def test_where_two_answers_part_and_by_how_little() -> None:
    tops = ({1: -0.1, 2: -3.0}, {5: -0.70, 6: -0.71})
    assert parity.parting(answer(1, 5), answer(1, 5)) is None
    found = parity.parting(answer(1, 5, tops=tops), answer(1, 6))
    assert found is not None
    assert found["at"] == 1
    assert found["margin"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "other", [answer(1, 9), answer(1), answer(1, 5, end="length")], ids=["token", "short", "end"]
)
def test_what_rounding_cannot_explain_has_no_margin(other: Answer) -> None:
    one = answer(1, 5, tops=({1: -0.1}, {5: -0.7, 6: -0.8}))
    found = parity.parting(one, other)
    assert found is not None
    assert found["margin"] is None


def test_no_difference_is_allowed_in_float32_and_none_without_a_reason_elsewhere() -> None:
    asked = prompts("m", (), number=2)
    equal = parity.compared(asked, [answer(1), answer(2)], [answer(1), answer(2)])
    close = parity.compared(
        asked, [answer(1, tops=({1: -0.7, 3: -0.7},)), answer(2)], [answer(3), answer(2)]
    )
    other = parity.compared(asked, [answer(1), answer(2)], [answer(3), answer(2)])
    assert (equal["equal"], close["equal"], other["unexplained"]) == (2, 1, 1)
    for precision, pair, fine in (
        ("float32", equal, True),
        ("float32", close, False),
        ("bfloat16", close, True),
        ("bfloat16", other, False),
    ):
        line = {"kind": "parity", "precision": precision, "pairs": {"a / b": pair}}
        assert as_it_must_be(json.loads(json.dumps(line))) is fine


def test_failed_requests_fail_the_benchmark() -> None:
    def line(failed: int) -> dict[str, object]:
        levels = {"1": {"worker": {"failed": failed}, "ratio": {"median": 1.0}}}
        return {"kind": "sglang_overhead", "levels": levels}

    assert as_it_must_be(line(0))
    assert not as_it_must_be(line(1))


def test_prompts_are_of_all_sorts_and_the_same_again() -> None:
    asked = prompts("m", ("formal", "terse"), number=60, seed=3)
    assert Counter(prompt.sort for prompt in asked) == dict.fromkeys(
        ("text", "one picture", "two pictures", "multi-turn", "stop", "adapter"), 10
    )
    assert asked == prompts("m", ("formal", "terse"), number=60, seed=3)
    assert asked != prompts("m", ("formal", "terse"), number=60, seed=4)
    assert all(len(p.request.images) == 2 for p in asked if p.sort == "two pictures")
    assert "adapter" not in {prompt.sort for prompt in prompts("m", (), number=10)}


@pytest.mark.parametrize("argv", [["all"], ["--rounds", "0"], ["--tokens", "1"], ["--levels", "0"]])
def test_a_wrong_command_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(argv)
    assert refused.value.code == 2
    assert "error:" in capsys.readouterr().err
