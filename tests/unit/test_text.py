"""workers.text: whole characters only, nothing lost, and no stop string leaks.

pytest tests/unit/test_text.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.text import REPLACEMENT, IncrementalDecoder, StopBuffer, TextStream

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
STOPS = st.lists(st.text("ab#é\n", min_size=1, max_size=4), max_size=3)


def decode_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer at its worst: each byte is a token."""
    return bytes(ids).decode("utf-8", "replace")


def decode_words(ids: Sequence[int]) -> str:
    """SentencePiece's habit: each token brings a space, and the text's first space is dropped."""
    return "".join(f" w{token_id}" for token_id in ids).removeprefix(" ")


@st.composite
def chunks(draw: st.DrawFn, ids: Sequence[int]) -> list[list[int]]:
    """``ids`` cut into runs, empty ones too."""
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [list(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@given(st.data(), TEXT)
def test_pieces_concatenate_to_the_text(data: st.DataObject, text: str) -> None:
    decoder = IncrementalDecoder(decode_bytes)
    pieces = [decoder.push(run) for run in data.draw(chunks(text.encode()))]
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


@given(st.binary(max_size=40))
def test_invalid_bytes_are_given_out_at_the_latest_at_the_end(data: bytes) -> None:
    decoder = IncrementalDecoder(decode_bytes)
    assert "".join(decoder.push([byte]) for byte in data) + decoder.flush() == decode_bytes(data)


@given(st.data(), st.lists(st.integers(0, 9), max_size=12))
def test_spaces_between_pieces_survive(data: st.DataObject, ids: list[int]) -> None:
    decoder = IncrementalDecoder(decode_words)
    assert "".join(decoder.push(run) for run in data.draw(chunks(ids))) == decode_words(ids)


def test_tokens_without_text_are_harmless() -> None:
    def decode(ids: Sequence[int]) -> str:
        return decode_bytes([token_id for token_id in ids if token_id < 256])

    decoder = IncrementalDecoder(decode)
    assert [decoder.push([i]) for i in (999, 0xC3, 999, 0xA9, 999)] == ["", "", "", "é", ""]
    assert decoder.flush() == ""


@given(st.data(), st.text("ab#é\n", max_size=30), STOPS)
def test_a_stop_string_never_leaks(data: st.DataObject, text: str, stops: list[str]) -> None:
    stream = TextStream(decode_bytes, stops)
    sent = ""
    for run in data.draw(chunks(text.encode())):
        sent += stream.push(run)
        assert text.startswith(sent)
        if stream.stopped:
            break
    sent += stream.flush()
    assert not any(stop in sent for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops)
    if stream.stopped:
        assert any(text.startswith(sent + stop) for stop in stops)
    else:
        assert sent == text


@given(st.text("ab#\n", max_size=30), STOPS)
def test_no_more_is_held_back_than_may_become_a_stop(text: str, stops: list[str]) -> None:
    buffer = StopBuffer(stops)
    sent = "".join(buffer.push(char) for char in text)
    if buffer.hit is None:
        held = text[len(sent) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_first_stop_wins_and_then_the_longest() -> None:
    buffer = StopBuffer(["b", "abc", "ab"])
    assert buffer.push("x abcd") == "x "
    assert buffer.hit == "abc"
    assert (buffer.push("more"), buffer.flush()) == ("", "")


@pytest.mark.parametrize("cut", range(9))
def test_a_resumed_stream_goes_on_where_the_other_left(cut: int) -> None:
    ids = "né #stop".encode()  # 9 bytes
    whole, resumed = (TextStream(decode_bytes, ["#stop"]) for _ in range(2))
    pieces = [whole.push([token_id]) for token_id in ids]
    for token_id in ids[:cut]:
        resumed.push([token_id])
    assert [resumed.push([token_id]) for token_id in ids[cut:]] == pieces[cut:]
    assert resumed.stopped
    assert whole.stopped
