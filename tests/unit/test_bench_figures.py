"""Figures from timelines made by hand, and streams of every kind read to timelines."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import pytest

from bench import figures as fig
from bench.compare import Cell, chosen_rates, ratios
from bench.figures import Limits
from bench.parity import compared, equal, is_exact, is_right
from bench.wire import Api, Ask, Exchange, Reply, reply_of
from protocol.errors import EngineFailed, Overloaded
from protocol.events import Delta, Failed, Finished, encode_sse

LIMITS = Limits(ttft_s=1.0, itl_s=0.5)


def reply(*delta_at: float, tokens: int = 0, end: str = "stop", **more: object) -> Reply:
    ended_at = delta_at[-1] if delta_at else 0.1
    fields = {"sent_at": 0.0, "ended_at": ended_at, "output_tokens": tokens or len(delta_at)}
    return Reply(end=end, delta_at=delta_at, **(fields | more))  # type: ignore[arg-type]


def refused() -> Reply:
    return Reply(end="refused", sent_at=0.0, ended_at=0.1, code="429 overloaded")


def test_latencies_are_those_of_the_glossary() -> None:
    one = reply(0.5, 0.7, 1.3, tokens=5)
    assert one.ttft_s == 0.5
    assert fig.itl_s(one) == pytest.approx([0.2, 0.6])
    assert fig.tpot_s(one) == pytest.approx(0.8 / 4)  # a delta may hold several tokens
    assert fig.tpot_s(reply(0.5)) is None


def test_an_answer_without_text_has_no_latencies() -> None:
    silent = reply(tokens=2)
    assert silent.ttft_s is None
    assert fig.tpot_s(silent) is None
    assert not fig.is_good(silent, LIMITS)


def test_refusals_and_failures_are_counted_apart_and_never_dropped() -> None:
    lost = Reply(end="failed", sent_at=0.0, ended_at=4.0, code="lost", output_tokens=7)
    found = fig.figures([reply(0.5, 1.0), refused(), refused(), lost], LIMITS)
    assert (found["requests"], found["answered"]) == (4, 1)
    assert found["refused"] == {"429 overloaded": 2}
    assert found["failed"] == {"lost": 1}
    assert found["window_s"] == 4.0
    assert found["requests_per_s"] == 0.25
    assert found["output_tokens_per_s"] == 0.5  # of answers only
    assert found["good_share"] == 0.25  # of all requests


def test_a_good_request_met_both_limits() -> None:
    assert fig.is_good(reply(0.9, 1.3), LIMITS)
    assert not fig.is_good(reply(1.1, 1.3), LIMITS)  # its first token came late
    assert not fig.is_good(reply(0.9, 1.5), LIMITS)  # it stuttered
    assert not fig.is_good(refused(), LIMITS)
    gaps = [0.1 * index for index in range(1, 40)]
    assert fig.is_good(reply(*gaps, 4.8), LIMITS)  # one gap in forty


def test_shares_of_the_cache_and_tokens_in_all() -> None:
    told = [
        reply(0.1, prompt_tokens=100, cached_tokens=80, images=1),
        reply(0.2, prompt_tokens=100, cached_tokens=0, images=1),
    ]
    found = fig.figures(told, LIMITS)
    assert found["cached_share"] == 0.4
    assert found["total_tokens_per_s"] == pytest.approx((200 + 2) / 0.2)
    assert found["images_per_s"] == pytest.approx(2 / 0.2)
    silent = fig.figures([*told, reply(0.1, prompt_tokens=None)], LIMITS)
    assert silent["cached_share"] is None
    assert silent["total_tokens_per_s"] is None


def test_medians_with_spread_and_sums_over_rounds() -> None:
    rounds = [
        {"rate": rate, "failed": {"lost": 1}, "requests": 4, "ttft_s": {"p50": rate / 10}}
        for rate in (3.0, 1.0, 2.0)
    ]
    rounds[0]["ttft_s"] = None
    found = fig.summary(rounds)
    assert found["rate"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert found["failed"] == {"lost": 3}
    assert found["requests"] == 12
    assert found["ttft_s"]["p50"]["max"] == 0.2


def test_ratios_are_within_a_round() -> None:
    def cell(target: str, *rates: float) -> Cell:
        rounds = {n: {"requests_per_s": rate} for n, rate in enumerate(rates)}
        return Cell("vqa", "closed", 8, target, rounds)

    (found,) = ratios([cell("a", 1.0, 2.0, 4.0), cell("b", 2.0, 6.0)])  # b died
    assert (found["target"], found["to"]) == ("b", "a")
    assert found["requests_per_s"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert found["output_tokens_per_s"] is None


def test_rates_lie_on_both_sides_of_every_knee() -> None:
    rates = chosen_rates([10.0, 40.0])
    assert min(rates) < 10 < max(rates)
    assert any(10 < rate <= 16 for rate in rates)
    assert any(rate > 40 for rate in rates)
    assert chosen_rates([]) == ()


# ---------------------------------------------------------------- streams


def exchange(
    chunks: Sequence[tuple[float, bytes]], *, status: int = 200, error: str = ""
) -> Exchange:
    return Exchange(0.0, 0.25, 9.0, images=0, status=status, chunks=tuple(chunks), error=error)


def sse(*payloads: object) -> list[bytes]:
    return [b"data: " + orjson.dumps(payload) + b"\n\n" for payload in payloads]


def sglang(text: str, ids: list[int], tokens: int, finish: str | None = None) -> object:
    meta = {"completion_tokens": tokens, "prompt_tokens": 9, "cached_tokens": 3}
    reason = {"type": finish} if finish else None
    return {"text": text, "output_ids": ids, "meta_info": meta | {"finish_reason": reason}}


STREAMS: dict[Api, list[list[bytes]]] = {
    "tandem": [
        [
            encode_sse(Delta(text="", token_ids=(1,))),
            encode_sse(Delta(text="red", token_ids=(2,))),
            encode_sse(Delta(text=" star", token_ids=(3, 4))),
            encode_sse(
                Finished(reason="stop", prompt_tokens=9, completion_tokens=4, cached_tokens=3)
            ),
        ]
    ],
    "openai": [
        [
            *sse(
                {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
                {"choices": [{"delta": {"content": "red"}, "finish_reason": None}]},
                {"choices": [{"delta": {"content": " star"}}]},
                {"choices": [{"delta": {}, "finish_reason": "stop"}]},
                {
                    "choices": [],
                    "usage": {
                        "prompt_tokens": 9,
                        "completion_tokens": 4,
                        "prompt_tokens_details": {"cached_tokens": 3},
                    },
                },
            ),
            b"data: [DONE]\n\n",
        ]
    ],
    "sglang": [
        sse(  # new text only
            sglang("", [1], 1),
            sglang("red", [2], 2),
            sglang(" star", [3, 4], 4),
            sglang("", [], 4, "stop"),
        ),
        sse(  # all so far
            sglang("", [1], 1),
            sglang("red", [1, 2], 2),
            sglang("red star", [1, 2, 3, 4], 4),
            sglang("red star", [1, 2, 3, 4], 4, "stop"),
        ),
    ],
}


@pytest.mark.parametrize(
    ("api", "number"), [(api, n) for api in STREAMS for n in range(len(STREAMS[api]))]
)
def test_every_stream_says_the_same(api: Api, number: int) -> None:
    chunks = [(1.0 + index, data) for index, data in enumerate(STREAMS[api][number])]
    got = reply_of(api, exchange(chunks))
    assert got.text == "red star"
    assert got.end == "stop"
    assert got.delta_at == (2.0, 3.0)  # deltas with text
    assert got.ttft_s == 1.75
    assert (got.output_tokens, got.prompt_tokens, got.cached_tokens) == (4, 9, 3)
    assert got.token_ids == (() if api == "openai" else (1, 2, 3, 4))
    assert not got.counted


@pytest.mark.parametrize("api", STREAMS)
def test_a_stream_without_its_end_is_a_failure(api: Api) -> None:
    got = reply_of(api, exchange([(1.0, STREAMS[api][0][0]), (2.0, STREAMS[api][0][1])]))
    assert (got.end, got.code) == ("failed", "cut")
    broken = reply_of(api, exchange([(1.0, STREAMS[api][0][1])], error="lost"))
    assert (broken.end, broken.code) == ("failed", "lost")


def test_a_server_that_says_no_counts_has_its_deltas_counted() -> None:
    data = sse({"choices": [{"delta": {"content": "red"}, "finish_reason": "stop"}]})[0]
    got = reply_of("openai", exchange([(1.0, data)]))
    assert (got.output_tokens, got.counted) == (1, True)


def test_frames_are_found_wherever_the_network_cut_them() -> None:
    whole = b"".join(STREAMS["openai"][0]).replace(b"\n\n", b"\r\n\r\n")
    pieces = [(float(at), whole[at : at + 7]) for at in range(0, len(whole), 7)]
    assert reply_of("openai", exchange(pieces)).text == "red star"


def test_refusals_have_their_status_and_code() -> None:
    body = orjson.dumps(Overloaded("Full.").body())
    got = reply_of("tandem", exchange([(1.0, body)], status=429))
    assert (got.end, got.code, got.message) == ("refused", "429 overloaded", "Full.")
    other = reply_of("openai", exchange([(1.0, b"<html>")], status=503))
    assert (other.end, other.code) == ("refused", "503")
    assert reply_of("openai", exchange([(1.0, b"no")], status=500)).end == "failed"


def test_a_failure_in_the_stream_is_none_of_silence() -> None:
    failed = encode_sse(Failed.of(EngineFailed("It broke.")))
    got = reply_of("tandem", exchange([(1.0, failed)]))
    assert (got.end, got.code) == ("failed", "engine_failed")


# ---------------------------------------------------------------- truth


def test_answers_are_equal_by_ids_or_by_text() -> None:
    one = reply(0.1, text="red", token_ids=(1, 2))
    assert equal(one, reply(0.1, text="red", token_ids=(1, 2)))
    assert not equal(one, reply(0.1, text="red", token_ids=(1, 3)))
    assert equal(one, reply(0.1, text="red "))  # this server tells no ids
    assert not equal(refused(), refused())


def test_exact_and_right() -> None:
    ask = Ask((("user", "What?"),), answer="It is red.", fact="red")
    assert is_exact(ask, reply(0.1, text="It is red."))
    assert is_right(ask, reply(0.1, text="A Red one"))
    assert not is_exact(ask, reply(0.1, text="A Red one"))
    assert not is_right(ask, refused())


def test_the_parity_of_three_targets() -> None:
    asked = [("colour", Ask((("user", "What?"),), answer="red")), ("sum", Ask((("user", "?"),)))]
    good = [reply(0.1, text="red"), reply(0.1, text="four")]
    answers = {"a": good, "b": good, "c": [reply(0.1, text="blue"), refused()]}
    found = compared(asked, answers)
    assert found["reference"] == "a"
    assert [found["targets"][name]["equal"] for name in "abc"] == [1.0, 1.0, 0.0]
    assert found["targets"]["c"]["not_answered"] == ["429 overloaded"]
    assert found["pairs"] == {"a / b": 2, "a / c": 0, "b / c": 0}
    assert found["different"][0]["answers"] == {"a": "red", "b": "red", "c": "blue"}
