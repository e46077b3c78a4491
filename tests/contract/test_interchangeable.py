"""The same request to either kind gives the same tokens: float32, greedy, on the CPU."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol.events import Delta
from protocol.messages import WorkerStatus
from tests.contract.conftest import ADAPTERS, START_TIMEOUT_S, Workers
from tests.pictures import encoded, picture
from tests.processes import running
from tests.streams import UNDECIDED, Answer, ask, refusal, user

pytestmark = pytest.mark.timeout(2 * START_TIMEOUT_S + 60)

TEXTS = [
    "How do I start a worker?",
    "What is RadixAttention?",
    "Count from 1 to 12.",
    "Hello!",
    "Wie geht es dir? ☃",
]
QUESTIONS = ["What color is the circle?", "What is this?", "How many objects are there?"]
PICTURES = [("circle", "red"), ("square", "blue"), ("circle", "green")]


@pytest.mark.parametrize("text", TEXTS)
def test_text(workers: Workers, text: str) -> None:
    fields: dict[str, Any] = {"model": "pocket-llava", "messages": user(text), "temperature": 0}
    hf = ask(workers["hf"].address, **fields, max_new_tokens=48)
    sglang = ask(workers["sglang"].address, **fields, max_new_tokens=48)
    assert hf.token_ids == sglang.token_ids
    assert hf.text == sglang.text
    assert hf.finished.prompt_tokens == sglang.finished.prompt_tokens
    assert hf.finished.reason == sglang.finished.reason


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(("shape", "colour"), PICTURES)
def test_pictures(workers: Workers, question: str, shape: str, colour: str) -> None:
    fields: dict[str, Any] = {
        "model": "pocket-llava",
        "messages": user("<image>" + question),
        "images": [encoded(picture(shape, colour))],
        "temperature": 0,
        "max_new_tokens": 32,
    }
    hf = ask(workers["hf"].address, **fields)
    sglang = ask(workers["sglang"].address, **fields)
    assert hf.token_ids == sglang.token_ids
    assert hf.text == sglang.text
    assert hf.finished.prompt_tokens == sglang.finished.prompt_tokens


@pytest.mark.parametrize("adapter", ["formal", "terse"])
def test_adapters(workers: Workers, adapter: str) -> None:
    asked: list[dict[str, Any]] = [{"messages": user(text)} for text in TEXTS]
    asked += [
        {"messages": user("<image>" + question), "images": [encoded(picture(shape, colour))]}
        for question in QUESTIONS
        for shape, colour in PICTURES
    ]
    common: dict[str, Any] = {
        "model": "pocket-llava",
        "temperature": 0,
        "max_new_tokens": 48,
        "adapter": adapter,
    }

    def answers(kind: str) -> list[Answer]:
        address = workers[kind].address
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda fields: ask(address, **common | fields), asked))

    for hf, sglang in zip(answers("hf"), answers("sglang"), strict=True):
        assert hf.token_ids == sglang.token_ids
        assert hf.text == sglang.text
        assert hf.finished.reason == sglang.finished.reason


def test_a_raw_prompt_with_two_pictures(workers: Workers) -> None:
    fields: dict[str, Any] = {
        "model": "pocket-llava",
        "prompt": "<image><image>What do you see?",
        "images": [encoded(picture("circle", "red")), encoded(picture("square", "blue"), "BMP")],
        "temperature": 0,
        "max_new_tokens": 24,
    }
    assert (
        ask(workers["hf"].address, **fields).token_ids
        == ask(workers["sglang"].address, **fields).token_ids
    )


def both(workers: Workers, **fields: Any) -> Answer:
    """The answer of either kind, which is the other's."""
    asked: dict[str, Any] = {"model": "pocket-llava", "temperature": 0, "max_new_tokens": 48}
    asked |= fields
    hf, sglang = (ask(workers[kind].address, **asked) for kind in ("hf", "sglang"))
    assert sglang.token_ids == hf.token_ids
    assert sglang.text == hf.text
    unlike = {"cached_tokens": 0}
    assert sglang.finished.model_copy(update=unlike) == hf.finished.model_copy(update=unlike)
    return sglang


TURNS = [
    {"role": "user", "content": "<image>What is this?"},
    {"role": "assistant", "content": "A red circle."},
    {"role": "user", "content": "<image>And this?"},
]
TWO = [encoded(picture("circle", "red")), encoded(picture("square", "blue"))]


def test_pictures_in_several_turns(workers: Workers) -> None:
    whole = both(workers, messages=TURNS, images=TWO)
    assert "blue" in whole.text
    cut = len(whole.token_ids) // 2
    rest = both(workers, messages=TURNS, images=TWO, resume_token_ids=whole.token_ids[:cut])
    assert rest.token_ids == whole.token_ids[cut:]


PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 0.7},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 2.0},
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.3},
    {"frequency_penalty": 1.0},
    {"frequency_penalty": -2.0},
    {"presence_penalty": 1.7, "frequency_penalty": 0.6},
    {"presence_penalty": -1.5, "frequency_penalty": 1.3, "repetition_penalty": 1.2},
]


ONE_OF_EACH = [{f"{name}_penalty": 2.0} for name in ("repetition", "presence", "frequency")]
# With a grammar SGLang waits for each token before the next step; without one it does not.
REPEATING: list[dict[str, Any]] = [
    UNDECIDED,
    UNDECIDED | {"regex": "[ab]{24}"},  # the same token twice in a row
    *(
        {"messages": user("Repeat: " + words), "max_new_tokens": 24}
        for words in ("red blue red blue red blue red blue", "dog cat dog dog cat cat dog dog dog")
    ),
]


@pytest.mark.parametrize("asked", REPEATING, ids=["grammar", "letters", "red blue", "dog cat"])
@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_penalties(workers: Workers, penalties: dict[str, float], asked: dict[str, Any]) -> None:
    fields = asked | penalties
    whole = both(workers, **fields)
    for cut in (1, 2, len(whole.token_ids) // 2, len(whole.token_ids) - 1):
        rest = both(workers, **fields, resume_token_ids=whole.token_ids[:cut])
        assert rest.token_ids == whole.token_ids[cut:], f"cut at {cut}"


def test_penalties_in_one_batch(workers: Workers) -> None:
    """Prefills come between the steps of others, and every answer stays what it is alone."""
    asked = [
        REPEATING[n % 4] | PENALTIES[n % len(PENALTIES)] | {"max_new_tokens": 2 + n}
        for n in range(30)
    ]
    alone = [both(workers, **fields).token_ids for fields in asked]
    greedy: dict[str, Any] = {"model": "pocket-llava", "temperature": 0}

    def one(fields: dict[str, Any]) -> list[int]:
        return ask(workers["sglang"].address, **greedy | fields).token_ids

    with ThreadPoolExecutor(len(asked)) as threads:
        for _ in range(2):
            assert list(threads.map(one, asked)) == alone


def test_penalties_behind_a_picture(workers: Workers) -> None:
    fields: dict[str, Any] = {"prompt": "What do you see? <image>", "images": TWO[:1]}
    fields |= {"regex": "[ab ]{20}", "max_new_tokens": 24}
    plain = both(workers, **fields)
    for penalties in ONE_OF_EACH:
        assert both(workers, **fields, **penalties).text != plain.text


OBJECT = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 10},
        "seen": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["colour", "count", "name"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    OBJECT,
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 6}]},
    {"type": "string", "format": "date"},
    {"type": "object"},
]
REGEXES = [r"(yes|no), \d{1,3}\.", ".{3,20}", "[^x]{1,30}", "(☃|é|日){2,4}"]
GRAMMARS = [*({"json_schema": json.dumps(s)} for s in SCHEMAS), *({"regex": r} for r in REGEXES)]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=str)
def test_grammars(workers: Workers, grammar: dict[str, str]) -> None:
    for penalty in (1.0, 1.5):
        fields = grammar | {"repetition_penalty": penalty}
        both(workers, messages=user("<image>What is this?"), images=TWO[:1], **fields)


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "("},
        {"regex": "a{100000}"},
        {"regex": "(?=a)b"},
        {"regex": "a\0b"},
        {"json_schema": ""},
        {"json_schema": '{"type": "colour"}'},
        {"json_schema": '{"uniqueItems": true}'},
        {"regex": "[a-f]{3}", "resume_token_ids": [24]},
    ],
    ids=str,
)
def test_grammars_are_refused_with_the_same_words(
    workers: Workers, grammar: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"model": "pocket-llava", "prompt": "a"} | grammar
    hf, sglang = (refusal(workers[kind].address, **asked) for kind in ("hf", "sglang"))
    assert sglang == hf


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 1.0},
        {"json_schema": json.dumps(OBJECT)},
        {"temperature": 0.5, "top_k": 1},
    ],
    ids=str,
)
def test_log_probabilities(workers: Workers, fields: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "model": "pocket-llava",
        "temperature": 0,
        "messages": user("<image>What is this?"),
        "images": TWO[:1],
        "max_new_tokens": 24,
        "logprobs": 5,
    }
    hf, sglang = (
        [
            logprob
            for event in ask(workers[kind].address, **asked | fields).events
            if isinstance(event, Delta)
            for logprob in event.logprobs or ()
        ]
        for kind in ("hf", "sglang")
    )
    assert len(hf) > 3
    for one, other in zip(hf, sglang, strict=True):
        assert (one.token_id, one.token) == (other.token_id, other.token)
        assert other.logprob == pytest.approx(one.logprob, abs=1e-3)
        assert [top.token for top in other.top] == [top.token for top in one.top]
        values = [top.logprob for top in one.top]
        assert [top.logprob for top in other.top] == pytest.approx(values, abs=1e-3)


def test_the_second_question_about_a_picture_is_cached(workers: Workers) -> None:
    image = encoded(picture("square", "orange"))
    answers = [
        ask(
            workers["sglang"].address,
            model="pocket-llava",
            messages=user("<image>" + question),
            images=[image],
            temperature=0,
            max_new_tokens=16,
        )
        for question in ("What is this?", "What color is the square?")
    ]
    assert answers[1].finished.cached_tokens >= 49, "all of the picture's tokens"
    response = httpx.post(f"{workers['sglang'].address}/worker_get_status")
    cache = WorkerStatus.model_validate_json(response.content).cache
    assert cache is not None
    assert cache.hit_rate > 0
    assert 0 < cache.used_tokens <= cache.size_tokens


def test_a_worker_attached_to_a_running_sglang_server(workers: Workers, tmp_path: Path) -> None:
    """--sgl-endpoint: the same server, and the same answers, without starting another."""
    children = psutil.Process(workers["sglang"].process.pid).children()
    command = next(child.cmdline() for child in children if "--port" in child.cmdline())
    endpoint = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    flags = ("--port", "0", "--no-register", "--sgl-endpoint", endpoint)
    with running(tmp_path, "workers.sglang", *flags) as attached:
        address = attached.wait_ready(START_TIMEOUT_S)
        assert not psutil.Process(attached.pid).children()
        fields: dict[str, Any] = {
            "model": "pocket-llava",
            "messages": user("<image>What is this?"),
            "images": [encoded(picture("circle", "green"))],
            "temperature": 0,
        }
        answer = ask(address, **fields)
        assert answer.token_ids == ask(workers["sglang"].address, **fields).token_ids
        assert answer.text
        before = served(endpoint)
        source = {"name": "curt", "path": str(ADAPTERS / "terse")}
        assert httpx.post(f"{address}/adapters", json=source, timeout=60).status_code == 200
        curt = ask(address, **fields, adapter="curt")
        wanted = ask(workers["sglang"].address, **fields, adapter="terse")
        assert curt.token_ids == wanted.token_ids != answer.token_ids
    assert ask(workers["sglang"].address, **fields).text == answer.text, "it was not stopped"
    assert served(endpoint) == before, "it was left as it was"


def served(endpoint: str) -> list[str]:
    """What an SGLang server calls its model and its adapters."""
    return sorted(model["id"] for model in httpx.get(f"{endpoint}/v1/models").json()["data"])
