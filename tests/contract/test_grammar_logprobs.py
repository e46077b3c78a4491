"""Answers that keep to a schema or a regex, and log probabilities: one behaviour, or a refusal."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from protocol.events import Delta, NulDecoder, TokenLogprob
from protocol.messages import WorkerStatus
from tests.contract.conftest import START_TIMEOUT_S, Worker
from tests.streams import PATH, Answer, ask, refusal, user

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)

ASKED: dict[str, Any] = {
    "model": "pocket-llava",
    "temperature": 0,
    "messages": user("Count from 1 to 20."),
    "max_new_tokens": 100,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "counts": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["colour", "counts", "sure"],
    "additionalProperties": False,
}
REGEX = "(red|green|blue) (circle|square), [0-9]{1,3}"


def needing(worker: Worker, capability: str, **fields: Any) -> None:
    """Skip the rest for a kind that lacks ``capability``, once it has refused ``fields``."""
    response = httpx.post(f"{worker.address}/worker_get_status")
    found = WorkerStatus.model_validate_json(response.content)
    if not getattr(found.capabilities, capability):
        status_code, error = refusal(worker.address, **ASKED | fields)
        assert (status_code, error["code"]) == (422, "unsupported"), error
        pytest.skip(f"{worker.kind} refuses {capability}, as it should")


def constrained(worker: Worker, **fields: Any) -> Answer:
    return ask(worker.address, **ASKED | fields)


def keeps(text: str, fields: dict[str, Any]) -> bool:
    """Whether ``text`` is what ``fields``, one of ``GRAMMARS``, allow."""
    if "regex" in fields:
        return re.fullmatch(fields["regex"], text) is not None
    value = json.loads(text)
    return (
        value.keys() == {"colour", "counts", "sure"}
        and value["colour"] in {"red", "green", "blue"}
        and 1 <= len(value["counts"]) <= 3
        and set(value["counts"]) <= {1, 2, 3}
        and isinstance(value["sure"], bool)
    )


GRAMMARS: list[dict[str, Any]] = [{"json_schema": json.dumps(SCHEMA)}, {"regex": REGEX}]


# ---------------------------------------------------------------- grammars


@pytest.mark.parametrize("fields", GRAMMARS, ids=["json_schema", "regex"])
def test_the_answer_keeps_to_the_grammar(worker: Worker, fields: dict[str, Any]) -> None:
    needing(worker, "grammar", **fields)
    for temperature in (0, 1, 30):  # at 30 the model itself has hardly a say
        answer = constrained(worker, temperature=temperature, **fields)
        assert answer.finished.reason == "stop", answer.text
        assert keeps(answer.text, fields), answer.text


@pytest.mark.parametrize("fields", GRAMMARS, ids=["json_schema", "regex"])
def test_resuming_inside_a_grammar_goes_on_in_it(worker: Worker, fields: dict[str, Any]) -> None:
    needing(worker, "grammar", **fields)
    whole = constrained(worker, **fields)
    ids = whole.token_ids
    for cut in sorted({1, len(ids) // 2, len(ids) - 1}):
        rest = constrained(worker, resume_token_ids=ids[:cut], **fields)
        assert rest.token_ids == ids[cut:], f"cut at {cut}"
        assert rest.finished.completion_tokens == len(ids)


def test_resumed_tokens_outside_the_grammar_are_refused(worker: Worker) -> None:
    needing(worker, "grammar", regex=REGEX)
    free = ask(worker.address, **ASKED)
    fields = {"regex": "[a-f]{3}☃", "resume_token_ids": free.token_ids[:3]}
    assert refusal(worker.address, **ASKED | fields)[1]["code"] == "invalid_request"


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": "{"},
        {"json_schema": '{"type": "colour"}'},
        {"regex": "("},
    ],
    ids=str,
)
def test_a_wrong_grammar_is_refused(worker: Worker, fields: dict[str, Any]) -> None:
    needing(worker, "grammar", **fields)
    status_code, error = refusal(worker.address, **ASKED | fields)
    assert (status_code, error["code"]) == (422, "invalid_request"), error


def test_a_grammar_binds_only_its_own_request(worker: Worker) -> None:
    needing(worker, "grammar", regex=REGEX)
    alone = ask(worker.address, **ASKED)
    bound = constrained(worker, regex=REGEX)
    with ThreadPoolExecutor(4) as pool:
        free = [pool.submit(ask, worker.address, **ASKED) for _ in range(2)]
        kept = [pool.submit(constrained, worker, regex=REGEX) for _ in range(2)]
        assert all(future.result().token_ids == alone.token_ids for future in free)
        assert all(future.result().token_ids == bound.token_ids for future in kept)


def test_the_token_limit_cuts_a_constrained_answer(worker: Worker) -> None:
    needing(worker, "grammar", regex=REGEX)
    whole = constrained(worker, regex=REGEX)
    cut = constrained(worker, regex=REGEX, max_new_tokens=3)
    assert cut.finished.reason == "length"
    assert cut.token_ids == whole.token_ids[:3]


# ---------------------------------------------------------------- log probabilities


def logprobs_of(answer: Answer) -> list[TokenLogprob]:
    """One for each token id of each delta; the test fails where they are out of step."""
    found: list[TokenLogprob] = []
    for event in answer.events:
        if isinstance(event, Delta):
            assert event.logprobs is not None
            assert tuple(logprob.token_id for logprob in event.logprobs) == event.token_ids
            found += event.logprobs
    assert found
    return found


def test_each_token_has_its_logprob_and_the_likeliest(worker: Worker) -> None:
    needing(worker, "logprobs", logprobs=3)
    answer = ask(worker.address, **ASKED, logprobs=3)
    for found in logprobs_of(answer):
        values = [top.logprob for top in found.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert math.fsum(math.exp(value) for value in values) <= 1 + 1e-4
        # Greedy: the likeliest was chosen.
        assert found.logprob == pytest.approx(values[0], abs=1e-4)
    spelt = "".join(found.token for found in logprobs_of(answer))
    assert spelt.startswith(answer.text)  # and an end token may follow


def test_logprobs_0_is_the_chosen_tokens_alone(worker: Worker) -> None:
    needing(worker, "logprobs", logprobs=0)
    plain = ask(worker.address, **ASKED)
    answer = ask(worker.address, **ASKED, logprobs=0)
    assert answer.token_ids == plain.token_ids
    assert all(found.top == () and found.logprob <= 1e-4 for found in logprobs_of(answer))
    assert all(event.logprobs is None for event in plain.events if isinstance(event, Delta))


def test_logprobs_are_those_before_temperature_and_penalties(worker: Worker) -> None:
    needing(worker, "logprobs", logprobs=2)
    greedy = logprobs_of(ask(worker.address, **ASKED, logprobs=2))
    warm = ASKED | {"temperature": 0.5, "top_k": 1, "repetition_penalty": 1.0001}
    found = logprobs_of(ask(worker.address, **warm, logprobs=2))
    assert [one.token_id for one in found] == [one.token_id for one in greedy]
    for one, other in zip(found, greedy, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_logprobs_are_those_before_the_grammar(worker: Worker) -> None:
    needing(worker, "logprobs", logprobs=1)
    needing(worker, "grammar", regex=REGEX)
    free = logprobs_of(ask(worker.address, **ASKED, logprobs=1))[0]
    bound = logprobs_of(constrained(worker, regex=REGEX, logprobs=1))[0]
    assert bound.top[0].token_id == free.top[0].token_id == free.token_id
    assert bound.top[0].logprob == pytest.approx(free.logprob, abs=1e-3)
    assert bound.logprob <= bound.top[0].logprob


def test_resumed_tokens_have_no_logprobs_and_new_ones_the_same(worker: Worker) -> None:
    needing(worker, "logprobs", logprobs=1)
    whole = logprobs_of(ask(worker.address, **ASKED, logprobs=1))
    resumed = [one.token_id for one in whole[:5]]
    rest = logprobs_of(ask(worker.address, **ASKED, logprobs=1, resume_token_ids=resumed))
    assert [one.token_id for one in rest] == [one.token_id for one in whole[5:]]
    for one, other in zip(rest, whole[5:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_llavas_framing_carries_logprobs(worker: Worker) -> None:
    needing(worker, "logprobs", logprobs=2)
    asked = ASKED | {"logprobs": 2, "max_new_tokens": 8}
    response = httpx.post(worker.address + PATH, json=asked, timeout=60)
    decoder = NulDecoder("")
    events = (*decoder.feed(response.content), *decoder.end())
    streamed = logprobs_of(ask(worker.address, **asked))
    for one, other in zip(logprobs_of(Answer(events)), streamed, strict=True):
        assert (one.token_id, one.token) == (other.token_id, other.token)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
