"""Workloads: the same for the same seed, and shared as they say."""

from __future__ import annotations

import base64
import json
from itertools import islice, pairwise
from pathlib import Path

import pytest

from bench.targets import Target, TargetError, parse
from bench.usage import without_secrets
from bench.wire import Ask
from bench.workloads import (
    TURNS,
    WORKLOADS,
    WorkloadError,
    arrivals,
    plan,
    read_trace,
    truth,
)

PNG = b"\x89PNG"


def planned(name: str, *, seed: int = 0, round_number: int = 0) -> list[list[Ask]]:
    return plan(WORKLOADS[name], seed=seed, round_number=round_number, users=6, requests=24)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_asks_the_same_and_another_round_does_not(name: str) -> None:
    asks = planned(name)
    assert asks == planned(name)
    assert [len(user) for user in asks] == [4] * 6
    assert asks != planned(name, round_number=1)
    for user in asks:
        for ask in user:
            assert sum(text.count("<image>") for _, text in ask.messages) == len(ask.images)
            assert ask.messages[-1][0] == "user"
            assert all(base64.b64decode(image).startswith(PNG) for image in ask.images)


def test_chat_grows_by_turns_under_a_few_system_prompts() -> None:
    users = planned("chat")
    systems = {ask.messages[0] for user in users for ask in user}
    assert len(systems) == 4
    assert all(len(text) > 400 for _, text in systems)
    for user in users:
        for earlier, later in pairwise(user):
            assert later.messages[: len(earlier.messages)] == earlier.messages
    assert len(users[0][TURNS - 1].messages) == 2 * TURNS
    assert users[0][0].messages[1:] != users[4][0].messages[1:]  # the same system prompt


def test_vqa_is_about_one_picture_and_vchat_about_ones_own() -> None:
    assert len({ask.images for user in planned("vqa") for ask in user}) == 1
    pictures = [{ask.images for ask in user} for user in planned("vchat")]
    assert all(len(its) == 1 for its in pictures)
    assert len(set.union(*pictures)) == 6


def test_random_shares_nothing() -> None:
    texts = [ask.messages[-1][1] for user in planned("random") for ask in user]
    assert len(set(texts)) == len(texts)
    assert len({text[:12] for text in texts}) == len(texts)


def test_truth_has_fifty_questions_with_one_right_answer_each() -> None:
    asked = truth(50)
    assert [ask for _, ask in asked] == [ask for _, ask in truth(50)]
    assert len({str(ask) for _, ask in asked}) == 50
    assert all(ask.answer for _, ask in asked)
    assert sum(bool(ask.images) for _, ask in asked) > 20
    assert len({sort for sort, _ in asked}) > 8
    assert [ask for _, ask in truth(10)] == [ask for _, ask in asked][:10]


def test_poisson_arrivals_keep_their_rate_and_their_seed() -> None:
    asks = list(islice(WORKLOADS["random"].asks(0, 0, 0), 400))
    due = arrivals(asks, rate=20.0, seed=1)
    assert due == arrivals(asks, rate=20.0, seed=1)
    times = [at_s for at_s, _ in due]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(20, rel=0.2)


def test_a_trace_is_read_in_the_order_of_its_arrivals(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    lines = [
        {
            "at_s": 2.0,
            "messages": [{"role": "user", "content": "And now? <image>"}],
            "images": ["draw:1"],
        },
        {"at_s": 0.5, "prompt": "What is this?", "images": ["cat.png"], "max_new_tokens": 9},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (first_s, first), (second_s, second) = read_trace(file)
    assert (first_s, second_s) == (0.5, 2.0)
    assert first.messages == (("user", "<image>What is this?"),)
    assert first.images == (base64.b64encode(PNG).decode(),)
    assert first.max_new_tokens == 9
    assert base64.b64decode(second.images[0]).startswith(PNG)


@pytest.mark.parametrize(
    "line",
    ["no JSON", '{"at_s": 1}', '{"prompt": "a <image> b"}', '{"prompt": "a", "images": ["?"]}'],
)
def test_a_bad_trace_says_which_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(WorkloadError, match="line 2"):
        read_trace(file)


def test_an_empty_or_missing_trace_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "missing"):
        with pytest.raises(WorkloadError, match=name):
            read_trace(tmp_path / name)


# ---------------------------------------------------------------- targets as they are written


def test_a_target_says_its_api_kind_and_model() -> None:
    written = parse("old=http://a:1/v1?api=openai&kind=hf#llava")
    assert (written.name, written.address) == ("old", "http://a:1")
    assert (written.api, written.kind, written.model) == ("openai", "hf", "llava")
    assert parse("b=http://a:1/below/").address == "http://a:1/below"


@pytest.mark.parametrize(
    "text", ["http://a:1", "=http://a:1", "a=b", "a=http://b?c=d", "a=http://b?api=x"]
)
def test_what_is_no_target_is_a_sentence(text: str) -> None:
    with pytest.raises(TargetError, match=r"\.$"):
        parse(text)


def test_one_question_in_three_spellings() -> None:
    ask = Ask((("system", "Be short."), ("user", "<image>What is this?")), ("AAAA",), 7)
    for api, words in (
        ("tandem", [b'"images":["AAAA"]', b'"max_new_tokens":7', b'"kind":"hf"']),
        ("openai", [b"data:image/png;base64,AAAA", b'"max_tokens":7', b'"kind":"hf"']),
        ("sglang", [b'"image_data":["AAAA"]', b'"text":"Be short."', b'"max_new_tokens":7']),
    ):
        target = Target("a", "http://a", api, "m", kind="hf", template=lambda a: a.messages[0][1])  # type: ignore[arg-type]
        body = target.body(ask)
        assert all(word in body for word in words), body


def test_a_key_is_not_written_down() -> None:
    assert without_secrets(["--api-key", "s", "--rounds", "3"]) == [
        "--api-key",
        "...",
        "--rounds",
        "3",
    ]
    assert without_secrets(["--api-key=s"]) == ["--api-key=..."]
