"""The body of SGLang's /generate: every field means there what it means in the protocol."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from protocol.errors import EngineFailed, InvalidRequest, Unsupported
from protocol.messages import GenerateRequest
from tests.pictures import encoded, picture
from workers.images import decode
from workers.sglang.client import refusal
from workers.sglang.request import (
    GrammarSpec,
    body_of,
    check,
    from_wire_text,
    wire_text,
)


def request(**given: Any) -> GenerateRequest:
    return GenerateRequest(**{"model": "m", "prompt": "p", **given})


def body(*, seeded: bool = False, ours: bool = True, **given: Any) -> dict[str, Any]:
    return body_of(
        request(**given),
        [7, 8, 9],
        [],
        max_new_tokens=5,
        seeded=seeded,
        ours=ours,
        eos_ids={3, 2},
        image_token_id=4,
    )


def sampling(**given: Any) -> dict[str, Any]:
    found: dict[str, Any] = body(**given)["sampling_params"]
    return found


def test_all_that_changes_the_choice_is_passed_on() -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    given |= {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    assert sampling(**given, stop=["a", "b"]) == given | {
        "max_new_tokens": 5,
        "stop": ["a", "b"],
        "stop_token_ids": [2, 3],
    }
    assert body()["input_ids"] == [7, 8, 9]


@pytest.mark.parametrize(
    ("given", "top_p", "top_k"),
    [({"top_k": 0}, 1.0, -1), ({"top_p": 0}, 1.0, 1), ({"top_p": 0.5, "top_k": 3}, 0.5, 3)],
)
def test_what_sglang_says_otherwise(given: dict[str, Any], top_p: float, top_k: int) -> None:
    found = sampling(**given)
    assert (found["top_p"], found["top_k"]) == (top_p, top_k)


def test_a_seed_goes_where_seeds_are_kept() -> None:
    assert sampling(seeded=True, seed=2**63 - 1)["sampling_seed"] == 2**63 - 1
    assert sampling(seeded=True, seed=0)["sampling_seed"] == 0
    assert "sampling_seed" not in sampling(seeded=False)


def test_without_a_seed_no_two_answers_are_alike() -> None:
    seeds = {sampling(seeded=True)["sampling_seed"] for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_min_p_would_end_a_server_with_seeds() -> None:
    check(request(min_p=0.1), seeded=False, ours=True)
    check(request(seed=1), seeded=True, ours=True)
    with pytest.raises(Unsupported, match="min_p"):
        check(request(min_p=0.1), seeded=True, ours=True)


@pytest.mark.parametrize("asked", [None, 0, 3])
def test_logprobs_are_asked_for_when_wanted(asked: int | None) -> None:
    found = body(logprobs=asked)
    assert found.get("return_logprob") == (None if asked is None else True)
    assert found.get("top_logprobs_num") == asked


# ---------------------------------------------------------------- resuming


def test_our_server_is_told_how_much_is_resumed() -> None:
    assert sampling(resume_token_ids=[8, 9])["custom_params"] == {"resumed_tokens": 2}
    assert "custom_params" not in sampling()
    assert "custom_params" not in sampling(ours=False, resume_token_ids=[8, 9])


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"regex": "a"},
    ],
    ids=str,
)
def test_another_server_cannot_resume_what_it_must_know(given: dict[str, Any]) -> None:
    resumed = request(resume_token_ids=[1], **given)
    check(resumed, seeded=False, ours=True)
    check(request(**given), seeded=False, ours=False)
    check(request(resume_token_ids=[1]), seeded=False, ours=False)
    with pytest.raises(Unsupported, match="resume"):
        check(resumed, seeded=False, ours=False)


# ---------------------------------------------------------------- grammars


@pytest.mark.parametrize("given", [{"regex": "a.b"}, {"json_schema": '{"type": "null"}'}])
def test_our_server_gets_a_grammar_with_all_it_needs(given: dict[str, str]) -> None:
    found = sampling(resume_token_ids=[8, 9], **given)
    assert "regex" not in found
    spec = GrammarSpec.model_validate_json(found["json_schema"])
    assert (spec.never, spec.resumed) == ((4,), (8, 9))
    assert spec.model_dump(include={"regex", "json_schema"}, exclude_none=True) == given


def test_another_server_gets_a_grammar_in_its_terms() -> None:
    assert sampling(ours=False, regex="a.b")["regex"] == r"a[^\n]b"
    assert sampling(ours=False, json_schema="{}")["json_schema"] == "{}"
    assert not {"regex", "json_schema"} & sampling(ours=False).keys()


@pytest.mark.parametrize("given", [{"regex": "a{100000}"}, {"json_schema": "{"}])
def test_another_server_gets_no_grammar_that_would_stop_it(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        body(ours=False, **given)


def test_an_error_crosses_sglang_as_what_it_is() -> None:
    error = InvalidRequest('The regex has "☃".', remedy="Leave it out.")
    for said in ("Failed to compile json grammar: ", "Grammar accept_token failed: "):
        found = refusal(500, json.loads(json.dumps(said + wire_text(error))))
        assert isinstance(found, InvalidRequest)
        assert (found.message, found.remedy) == (error.message, error.remedy)
    assert from_wire_text("Failed to compile json grammar: no.") is None
    assert isinstance(from_wire_text(wire_text(error)[:-5]), EngineFailed)


# ---------------------------------------------------------------- pictures


def test_pictures_are_files_that_we_wrote() -> None:
    sent = [encoded(picture("circle", "red"), "BMP"), encoded(picture("square", "blue"), "JPEG")]
    pictures = decode(sent, max_pixels=10**6)
    found = body_of(request(), [1], pictures, max_new_tokens=1, seeded=False, ours=True)
    for given, made, source in zip(sent, found["image_data"], pictures, strict=True):
        assert made != given
        image = Image.open(io.BytesIO(base64.b64decode(made, validate=True)))
        assert (image.format, image.size) == ("PNG", source.pixels.size)
