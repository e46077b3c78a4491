"""The plain functions of the Hugging Face worker's benchmark."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.client import Answer, answer_of, body_of
from bench.hf.__main__ import as_it_must_be, parse
from bench.hf.mixes import LARGEST, SMALLEST, beside_others, difference, drawn_mix
from bench.hf.precision import totals, weights_mib
from bench.hf.speed import ALSO_WITHOUT, OFF, ON, bodies, figures, plan
from bench.pool import cases
from bench.processes import tail
from bench.rates import Measured, measured
from bench.results import quantile, rounded, spread
from protocol.events import Delta, Failed, Finished, TokenLogprob, encode_sse
from protocol.messages import Capabilities, GenerateRequest, WorkerStatus

ALL = Capabilities(
    chat=True, images=True, adapters=True, grammar=True, logprobs=True, seed=True, resume=True
)
STATUS = WorkerStatus(model_names=("pocket-llava",), context_length=64, capabilities=ALL)


def answer(*token_at: float, sent_at: float = 0.0, end: str = "length", text: str = "") -> Answer:
    ids = tuple(range(len(token_at)))
    return Answer(end=end, text=text, token_ids=ids, token_at=token_at, sent_at=sent_at)


# ---------------------------------------------------------------- what a client saw


def test_a_stream_split_anywhere_is_one_answer() -> None:
    logprob = TokenLogprob(token_id=5, token="a", logprob=-0.5)
    events = (
        Delta(text="a", token_ids=(5,), logprobs=(logprob,)),
        Delta(text="bc", token_ids=(6, 7)),
        Finished(reason="stop"),
    )
    stream = b"".join(encode_sse(event) for event in events)
    chunks = [(float(i), stream[i : i + 9]) for i in range(0, len(stream), 9)]
    got = answer_of(chunks, sent_at=-1.0)
    assert (got.end, got.text, got.token_ids, got.logprobs) == ("stop", "abc", (5, 6, 7), (-0.5,))
    assert got.token_at[0] < got.token_at[1] == got.token_at[2] < got.ended_at
    assert got.ttft_s == got.token_at[0] + 1


def test_a_stream_without_its_end_is_cut_unless_its_client_left() -> None:
    chunks = [(1.0, encode_sse(Delta(text="a", token_ids=(5,))))]
    assert answer_of(chunks, sent_at=0.0).end == "cut"
    assert answer_of(chunks, sent_at=0.0, end="left").end == "left"
    assert answer_of([], sent_at=0.0, end="left").ttft_s is None


def test_a_failure_ends_an_answer_by_its_code() -> None:
    chunks = [(1.0, encode_sse(Failed(code="engine_failed", message="It broke.")))]
    got = answer_of(chunks, sent_at=0.0)
    assert (got.end, got.message) == ("engine_failed", "It broke.")


def test_who_left_after_the_end_has_the_whole_answer() -> None:
    chunks = [(1.0, encode_sse(Finished(reason="length")))]
    assert answer_of(chunks, sent_at=0.0, end="left").end == "length"


# ---------------------------------------------------------------- speed


def test_speed_is_from_the_first_token_to_the_last() -> None:
    wave = [answer(1.0, 2.0, 3.0), answer(1.5, 2.5, sent_at=0.5, end="stop")]
    found = measured([wave, [answer(11.0, 12.0, sent_at=10.0, end="out_of_memory")]])
    assert found.rate == pytest.approx((4 + 1) / (2 + 1))
    assert found.rate_from_sending == pytest.approx((5 + 2) / (3 + 2))
    assert found.ttft_s == (1.0, 1.0, 1.0)
    assert (found.short, found.failed) == (1, 1)


def test_no_token_is_no_speed() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        measured([[answer(end="overloaded")]])


def test_a_round_measures_each_level_with_both_and_takes_turns() -> None:
    even, odd = list(plan(0, [1, 4])), list(plan(1, [1, 4]))
    assert even == [(1, ON), (1, OFF), (ALSO_WITHOUT, OFF), (4, ON), (4, OFF)]
    assert odd == [(1, OFF), (1, ON), (ALSO_WITHOUT, OFF), (4, OFF), (4, ON)]


def test_ratios_are_taken_within_a_round() -> None:
    def at(rate: float) -> Measured:
        return Measured(rate, rate, ttft_s=(0.1,), tokens=9, short=0, failed=0)

    # The second round ran on a machine half as fast.
    rounds = [
        {(1, ON): at(10.0), (1, OFF): at(10.0), (4, ON): at(40.0), (4, OFF): at(8.0)},
        {(1, ON): at(5.0), (1, OFF): at(5.0), (4, ON): at(20.0), (4, OFF): at(4.0)},
    ]
    found = figures(rounds)
    assert found["best_level_off"] == 1
    assert found["levels"]["4"]["ratio"] == {"median": 5.0, "min": 5.0, "max": 5.0}
    assert found["levels"]["4"]["ratio_to_best"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert found["levels"]["4"][ON]["tokens_per_s"] == {"median": 30.0, "min": 20.0, "max": 40.0}


def test_every_second_request_has_a_picture() -> None:
    made = [
        GenerateRequest.model_validate_json(body)
        for body in bodies("m", 4, tokens=7, pictures=True)
    ]
    assert [len(request.images) for request in made] == [0, 1, 0, 1]
    assert {request.max_new_tokens for request in made} == {7}


# ---------------------------------------------------------------- mixes

EXPECTED = Answer(end="stop", text="abc", token_ids=(1, 2, 3), logprobs=(-1.0, -2.0, -3.0))
LATER = (-1.0, -2.0, -3.0 + 1e-5)


@pytest.mark.parametrize(
    "got",
    [
        Answer("stop", "abc", (1, 2, 3), logprobs=LATER),
        Answer("left"),
        Answer("left", "a", (1, 2), logprobs=(-1.0, -2.0)),
    ],
)
def test_what_is_right_differs_by_nothing(got: Answer) -> None:
    assert difference(EXPECTED, got, logprobs_agree=1e-3) == ""


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (Answer("stop", "abd", (1, 2, 4)), "token 2 is 4, not 3"),
        (Answer("stop", "ab", (1, 2)), "2 tokens, not 3"),
        (Answer("stop", "abcd", (1, 2, 3, 4)), "4 tokens, not 3"),
        (Answer("left", "abcd", (1, 2, 3, 4)), "4 tokens, not 3"),
        (Answer("length", "abc", (1, 2, 3)), "it ended by length, not stop"),
        (Answer("out_of_memory", message="It is full."), "It is full."),
        (Answer("stop", "abd", (1, 2, 3)), "its text is 'abd', not 'abc'"),
        (Answer("left", "b", (1,)), "its text is 'b', not 'a'"),
        (Answer("stop", "abc", (1, 2, 3)), "0 logprobs for 3 tokens"),
        (Answer("stop", "abc", (1, 2, 3), logprobs=(-1.0, -2.5, -3.0)), "logprob of token 1"),
    ],
)
def test_what_is_wrong_is_named(got: Answer, said: str) -> None:
    assert said in difference(EXPECTED, got, logprobs_agree=1e-3)


def test_a_mix_is_drawn_from_its_seed() -> None:
    durations_s = [0.1, 0.4, 0.2]
    mixes = [drawn_mix(random.Random(seed), durations_s) for seed in range(200)]
    assert mixes[7] == drawn_mix(random.Random(7), durations_s)
    assert {len(mix) for mix in mixes} == set(range(SMALLEST, LARGEST + 1))
    members = [member for mix in mixes for member in mix]
    assert {member.case for member in members} == {0, 1, 2}
    assert any(member.leave_s is not None for member in members)


def test_answers_beside_others_are_those_whose_tokens_came_at_one_time() -> None:
    assert beside_others([answer(1.0, 3.0), answer(2.0, 4.0), answer(5.0, 6.0), answer()]) == 2


def test_some_sixty_requests_of_all_sorts_no_two_alike() -> None:
    pool = cases(STATUS, ("formal", "terse"), seed=0)
    assert len({body_of(case.request) for case in pool}) == len(pool) >= 60
    asked = [case.request for case in pool]
    assert {request.adapter for request in asked} == {None, "formal", "terse"}
    assert frozenset().union(*(request.needs for request in asked)) >= {
        *("adapters", "grammar", "images", "logprobs", "seed"),
    }


def test_a_worker_is_asked_only_what_it_can() -> None:
    plain = STATUS.model_copy(update={"capabilities": Capabilities(chat=True)})
    pool = cases(plain, ("formal",), seed=0)
    assert {need for case in pool for need in case.request.needs} == {"chat"}


# ---------------------------------------------------------------- the rest


def test_weights_are_read_from_the_log() -> None:
    assert weights_mib(["listening", "weights 10.0 MiB -> 3.6 MiB"]) == (10.0, 3.6)
    assert weights_mib(["listening"]) is None


def test_the_total_weighs_sections_by_their_questions() -> None:
    marks = [
        {"n": 1, "exact_answers": 1, "right_facts": 1},
        {"n": 3, "exact_answers": 0, "right_facts": 3},
    ]
    assert totals(marks) == {"n": 4, "exact": 0.25, "fact": 1.0}


def test_statistics_say_what_they_are() -> None:
    assert spread([3.0, 1.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0}
    assert quantile([float(value) for value in range(1, 101)], 0.95) == 95.0
    assert quantile([7.0], 0.95) == 7.0
    assert rounded({"a": [1 / 3, 12345.678], "n": 3}) == {"a": [0.3333, 12350.0], "n": 3}


def test_a_log_ends_in_sentences(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text('{"level":"ERROR","event":"could not start: no model"}\nSegmentation fault\n')
    assert tail(log) == "  ERROR could not start: no model\n  Segmentation fault"


def test_the_exit_code_knows_what_must_not_be() -> None:
    mixes = {"kind": "hf_mixes", "precision": "float32", "mismatches": 0, "held_after": 0}
    assert as_it_must_be(mixes)
    assert not as_it_must_be(mixes | {"mismatches": 1})
    assert not as_it_must_be(mixes | {"held_after": 1})
    assert as_it_must_be(mixes | {"mismatches": 1, "precision": "bfloat16"})
    side = {"failed": 1}
    assert not as_it_must_be({"kind": "hf_speed", "levels": {"2": {"off": side}}})


def test_no_part_named_is_all_parts() -> None:
    assert parse([]).parts == ["speed", "mixes", "precision"]
    assert parse(["mixes", "--levels", "4", "1", "4"]).levels == [1, 4]
    with pytest.raises(SystemExit):
        parse(["sped"])
