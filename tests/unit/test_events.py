"""Both framings: any event stream, any Unicode, any split of the bytes."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Overloaded, UpstreamLost
from protocol.events import (
    LOWEST_LOGPROB,
    Delta,
    Event,
    Failed,
    Finished,
    NulDecoder,
    NulEncoder,
    SseDecoder,
    TokenLogprob,
    TopLogprob,
    encode_sse,
)

prompts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
token_ids = st.integers(0, 2**31)
logs = st.floats(LOWEST_LOGPROB, 0)
tops = st.builds(TopLogprob, token_id=token_ids, token=texts, logprob=logs)
token_logprobs = st.builds(
    TokenLogprob,
    token_id=token_ids,
    token=texts,
    logprob=logs,
    top=st.lists(tops, max_size=2).map(tuple),
)
deltas = st.builds(
    Delta,
    text=texts,
    token_ids=st.lists(token_ids, min_size=1, max_size=4).map(tuple),
    logprobs=st.none() | st.lists(token_logprobs, min_size=1, max_size=2).map(tuple),
)
finished = st.builds(
    Finished,
    reason=st.sampled_from(["stop", "length"]),
    prompt_tokens=st.integers(0, 10**6),
    completion_tokens=st.integers(0, 10**6),
    cached_tokens=st.integers(0, 10**6),
)
failed = st.builds(
    Failed,
    code=st.sampled_from(["upstream_lost", "engine_failed", "out_of_memory"]),
    message=prompts.filter(bool),
    remedy=prompts,
)
streams = st.tuples(st.lists(deltas, max_size=8), finished | failed).map(lambda s: [*s[0], s[1]])


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


@given(streams, st.lists(st.integers(0, 10**6), max_size=30))
def test_sse_survives_any_split(events: list[Event], cuts: list[int]) -> None:
    data = b"".join(encode_sse(event) for event in events)
    decoder = SseDecoder()
    assert [e for piece in split(data, cuts) for e in decoder.feed(piece)] == events
    assert not decoder.pending


@given(streams, prompts, st.lists(st.integers(0, 10**6), max_size=30))
def test_nul_frames_survive_any_split(events: list[Event], prompt: str, cuts: list[int]) -> None:
    encoder = NulEncoder(prompt)
    data = b"".join(encoder.encode(event) for event in events)
    decoder = NulDecoder(prompt)
    decoded = [e for piece in split(data, cuts) for e in decoder.feed(piece)]
    assert decoded + decoder.end() == events


@given(st.lists(deltas, min_size=1, max_size=8), prompts)
def test_nul_frames_are_cumulative_and_begin_with_the_prompt(
    events: list[Delta], prompt: str
) -> None:
    encoder = NulEncoder(prompt)
    frames = [orjson.loads(encoder.encode(event)[:-1]) for event in events]
    for count, frame in enumerate(frames, start=1):
        assert frame["text"] == prompt + "".join(event.text for event in events[:count])
        assert frame["error_code"] == 0


@given(streams)
def test_sse_frames_are_two_lines(events: list[Event]) -> None:
    for event in events:
        frame = encode_sse(event)
        assert frame.endswith(b"\n\n")
        assert frame.count(b"\n") == 3
        assert frame.startswith(b"event: %b\n" % event.type.encode())


def test_sse_comments_and_carriage_returns() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b": ping\n\n") == []
    frame = encode_sse(Delta(text="a")).replace(b"\n", b"\r\n").replace(b"\r\n\r\n", b"\n\n")
    assert decoder.feed(frame) == [Delta(text="a")]


@pytest.mark.parametrize(
    "data", [b"data: {}\n\n", b"data: nonsense\n\n", b'data: {"type":"x"}\n\n']
)
def test_a_foreign_event_is_a_lost_upstream(data: bytes) -> None:
    with pytest.raises(UpstreamLost):
        SseDecoder().feed(data)


def frame(**fields: object) -> bytes:
    return orjson.dumps(fields) + b"\0"


def test_llavas_worker_ends_by_ending() -> None:
    decoder = NulDecoder("Hi")
    assert decoder.feed(frame(text="Hi there", error_code=0)) == [Delta(text=" there")]
    assert decoder.end() == [Finished(reason="stop")]


def test_a_worker_that_names_its_end_must_name_it() -> None:
    decoder = NulDecoder("Hi")
    decoder.feed(frame(text="Hi there", error_code=0, finish_reason=None))
    assert decoder.end() == []


def test_a_body_cut_inside_a_frame_has_no_end() -> None:
    decoder = NulDecoder("Hi")
    decoder.feed(frame(text="Hi there", error_code=0) + b'{"text": "Hi the')
    assert decoder.end() == []


def test_a_worker_that_does_not_echo_the_prompt() -> None:
    decoder = NulDecoder("Hi")
    assert decoder.feed(frame(text="Yes", error_code=0)) == [Delta(text="Yes")]
    assert decoder.feed(frame(text="Yes, well", error_code=0)) == [Delta(text=", well")]


def test_llavas_error_is_a_failure() -> None:
    events = NulDecoder("Hi").feed(frame(text="**NETWORK ERROR**", error_code=1))
    assert events == [
        Failed(
            code="engine_failed",
            message="**NETWORK ERROR**",
            remedy="Look into the worker's log; it names the cause.",
        )
    ]


def test_fastchats_logprobs_are_left_out() -> None:
    logprobs = {"tokens": ["a"], "token_logprobs": [-1.0]}
    assert NulDecoder("").feed(frame(text="a", logprobs=logprobs)) == [Delta(text="a")]


def test_logprobs_that_are_none_of_ours_are_a_lost_upstream() -> None:
    with pytest.raises(UpstreamLost):
        NulDecoder("").feed(frame(text="a", logprobs=[{"token": 7}]))


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e30])
def test_what_json_cannot_say_is_very_unlikely(value: float) -> None:
    top = (TopLogprob(token_id=1, token="a", logprob=value),)
    token = TokenLogprob(token_id=1, token="a", logprob=value, top=top)
    assert token.logprob == token.top[0].logprob == LOWEST_LOGPROB
    delta = Delta(text="a", token_ids=(1,), logprobs=(token,))
    assert SseDecoder().feed(encode_sse(delta)) == [delta]
    assert NulDecoder("").feed(NulEncoder("").encode(delta)) == [delta]


def test_a_delta_without_logprobs_does_not_mention_them() -> None:
    assert b"logprobs" not in encode_sse(Delta(text="a", token_ids=(1,)))
    assert b"logprobs" not in NulEncoder("").encode(Delta(text="a", token_ids=(1,)))


@pytest.mark.parametrize("data", [b"{\0", b"[]\0", b"{}\0", b'{"text": 7, "error_code": 0}\0'])
def test_a_foreign_frame_is_a_lost_upstream(data: bytes) -> None:
    with pytest.raises(UpstreamLost):
        NulDecoder("").feed(data)


def test_text_taken_back_is_a_lost_upstream() -> None:
    decoder = NulDecoder("")
    decoder.feed(frame(text="abc", error_code=0))
    with pytest.raises(UpstreamLost):
        decoder.feed(frame(text="ab", error_code=0))


def test_nothing_comes_after_the_end() -> None:
    decoder = NulDecoder("")
    data = frame(text="a", error_code=0, finish_reason="stop") + frame(text="ab", error_code=0)
    assert decoder.feed(data) == [Delta(text="a"), Finished(reason="stop")]


def test_a_failed_event_is_its_error_again() -> None:
    error = Overloaded("Full.", remedy="Wait.")
    assert type(Failed.of(error).error()) is Overloaded
    assert Failed.of(error).error().remedy == "Wait."


def test_what_a_foreign_worker_may_take_back_is_held() -> None:
    """Half a character, the beginning of a stop string, and blanks that FastChat tidies up."""
    decoder = NulDecoder("Hi", ("###", "END"))
    assert decoder.feed(frame(text="Hi one\ufffd", error_code=0)) == [Delta(text=" one")]
    assert decoder.feed(frame(text="Hi oneé E", error_code=0)) == [Delta(text="é ")]
    assert decoder.feed(frame(text="Hi oneé Even #", error_code=0)) == [Delta(text="Even ")]
    assert decoder.end() == [Delta(text="#"), Finished(reason="stop")]
    tidied = NulDecoder("", ())
    tidied.feed(frame(text="Well ", error_code=0, usage={}, finish_reason=None))
    assert tidied.feed(frame(text="Well, yes", error_code=0, usage={}, finish_reason="length")) == [
        Delta(text=", yes"),
        Finished(reason="length"),
    ]


def test_a_stop_string_ends_the_answer_whatever_its_worker_does() -> None:
    decoder = NulDecoder("a END b", ("END",))
    data = frame(text="a END bone END two END", error_code=0)
    assert decoder.feed(data) == [Delta(text="one "), Finished(reason="stop")]
    assert decoder.feed(data) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [(1, "engine_failed"), (2, "no_replica"), (3, "upstream_lost"), (50002, "out_of_memory")],
)
def test_numbers_of_others_that_say_something(number: int, code: str) -> None:
    (failed,) = NulDecoder("").feed(frame(text="sorry", error_code=number))
    assert isinstance(failed, Failed)
    assert failed.code == code
