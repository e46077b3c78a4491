"""What "interchangeable" means: every kind of worker passes this one file.

The laws are those of docs/architecture.md. Tests talk to real processes over real sockets.
"""

from __future__ import annotations

import base64
import random
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from tokenizers import Tokenizer

from protocol.events import Delta, Failed, Finished, NulDecoder, is_terminal
from protocol.messages import WorkerStatus
from tests.contract.conftest import START_TIMEOUT_S, Worker
from tests.pictures import encoded, picture
from tests.processes import ROOT, until
from tests.streams import PATH, UNDECIDED, Answer, ask, refusal, streaming, user

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)

MODEL = "pocket-llava"
COUNT = "Count from 1 to 20."
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


def count(worker: Worker, **fields: Any) -> Answer:
    """A long deterministic answer."""
    return ask(worker.address, **GREEDY | {"messages": user(COUNT), "max_new_tokens": 60} | fields)


def status(worker: Worker) -> WorkerStatus:
    response = httpx.post(f"{worker.address}/worker_get_status")
    return WorkerStatus.model_validate_json(response.content)


def wait_idle(worker: Worker) -> None:
    until(lambda: status(worker).running == status(worker).waiting == 0, what="an idle worker")


def nul_frames(worker: Worker, **fields: Any) -> bytes:
    response = httpx.post(worker.address + PATH, json=GREEDY | fields, timeout=60)
    assert response.status_code == 200, response.text
    return response.content


# ---------------------------------------------------------------- L1, L2: the stream


def test_a_stream_is_deltas_and_one_terminal_event(worker: Worker) -> None:
    events = count(worker).events
    assert [is_terminal(event) for event in events] == [False] * (len(events) - 1) + [True]
    assert isinstance(events[-1], Finished)


def test_it_streams_rather_than_waiting_for_the_end(worker: Worker) -> None:
    assert len(count(worker).events) > 10


def test_usage_adds_up(worker: Worker) -> None:
    answer = count(worker)
    assert answer.finished.completion_tokens == len(answer.token_ids) > 0
    assert answer.finished.prompt_tokens > 0
    assert 0 <= answer.finished.cached_tokens <= answer.finished.prompt_tokens


def test_both_framings_say_the_same(worker: Worker) -> None:
    answer = count(worker)
    frames = nul_frames(worker, messages=user(COUNT), max_new_tokens=60)
    decoder = NulDecoder("")
    cumulative = Answer((*decoder.feed(frames), *decoder.end()))
    assert cumulative.text == answer.text
    assert cumulative.token_ids == answer.token_ids
    assert cumulative.finished.reason == answer.finished.reason


def test_llavas_framing_echoes_the_prompt(worker: Worker) -> None:
    first = nul_frames(worker, prompt="Say something", max_new_tokens=4).split(b"\0")[0]
    assert b'"text":"Say something' in first


def test_deltas_are_the_decoded_token_ids(worker: Worker) -> None:
    """Random tokens, so that characters are split and broken: nothing is lost, doubled or cut."""
    if worker.kind == "echo":
        text = "naïve ☃ 𝄞 日本語 e\u0301"
        answer = ask(worker.address, **GREEDY, prompt=text)
        assert answer.text == text
    else:
        tokenizer = Tokenizer.from_file(str(ROOT / "models" / MODEL / "tokenizer.json"))
        wild = {"temperature": 50.0, "max_new_tokens": 120}
        answer = count(worker, **wild)
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    for event in answer.events[:-2]:
        assert isinstance(event, Delta)
        assert not event.text.endswith("\ufffd"), "half a character was sent"


# ---------------------------------------------------------------- when an answer ends


def test_max_new_tokens_ends_it_with_length(worker: Worker) -> None:
    whole = count(worker)
    cut = count(worker, max_new_tokens=7)
    assert cut.finished.reason == "length"
    assert cut.token_ids == whole.token_ids[:7]


def test_greedy_is_deterministic(worker: Worker) -> None:
    assert count(worker).token_ids == count(worker).token_ids


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_stop_string_never_leaks_and_nothing_before_it_is_lost(
    worker: Worker, length: int
) -> None:
    whole = count(worker).text
    for start in (len(whole) // 5, len(whole) // 2, len(whole) - length):
        stop = whole[start : start + length]
        answer = count(worker, stop=[stop, "never this"])
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finished.reason == "stop"


def test_a_stop_string_that_never_comes_holds_nothing_back(worker: Worker) -> None:
    whole = count(worker).text
    assert count(worker, stop=whole[-4:] + "¶").text == whole


# ---------------------------------------------------------------- L3: refusals


def bomb() -> str:
    """A PNG whose header claims 60000 x 60000 pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 10000)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


GOOD = encoded(picture())
LINE = encoded(Image.new("RGB", (1, 9000)))
BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no prompt": ({}, 422, "invalid_request"),
    "prompt and messages": ({"prompt": "a", "messages": user("a")}, 422, "invalid_request"),
    "wrong type": ({"prompt": 7}, 422, "invalid_request"),
    "no tokens": ({"prompt": "a", "max_new_tokens": 0}, 422, "invalid_request"),
    "image without place": ({"prompt": "a", "images": [GOOD]}, 422, "invalid_request"),
    "place without image": ({"prompt": "<image> a"}, 422, "invalid_request"),
    "no base64": ({"prompt": "<image>", "images": ["not base64!"]}, 422, "bad_image"),
    "cut base64": ({"prompt": "<image>", "images": [GOOD[:-7]]}, 422, "bad_image"),
    "cut image": ({"prompt": "<image>", "images": [GOOD[: len(GOOD) // 8 * 4]]}, 422, "bad_image"),
    "no image": ({"prompt": "<image>", "images": ["aGVsbG8gd29ybGQ="]}, 422, "bad_image"),
    "a bomb": ({"prompt": "<image>", "images": [bomb()]}, 422, "bad_image"),
    "an address": ({"prompt": "<image>", "images": ["http://127.0.0.1/x.png"]}, 422, "bad_image"),
    "a path": ({"prompt": "<image>", "images": ["/etc/passwd"]}, 422, "bad_image"),
    "a file": ({"prompt": "<image>", "images": ["file:///etc/passwd"]}, 422, "bad_image"),
    "unknown model": ({"prompt": "a", "model": "gpt-5"}, 404, "model_not_found"),
    "long prompt": ({"prompt": "word " * 20000}, 413, "context_overflow"),
    "two grammars": ({"prompt": "a", "regex": "a", "json_schema": "{}"}, 422, "invalid_request"),
    "a line": ({"prompt": "<image>", "images": [LINE]}, 422, "bad_image"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_type(worker: Worker, case: str) -> None:
    fields, status_code, code = BAD_REQUESTS[case]
    got, error = refusal(worker.address, **GREEDY | fields)
    assert (got, error["code"]) == (status_code, code), error


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": "pocket-llava"'])
def test_garbage_is_refused(worker: Worker, body: bytes) -> None:
    assert refusal(worker.address, body)[1]["code"] == "invalid_request"


def test_a_body_too_large_is_refused_before_it_is_read(worker: Worker) -> None:
    url = urlsplit(worker.address)
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=20) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-length: {50 << 20}\r\n\r\n"
        connection.sendall(head.encode())  # and not one byte of the body
        answer = b""
        while b"error_code" not in answer:
            piece = connection.recv(65536)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"too_large" in answer


def test_an_unknown_adapter_never_gets_the_base_models_answer(worker: Worker) -> None:
    for fields in ({"adapter": "nobody"}, {"model": f"{MODEL}:nobody"}):
        found = refusal(worker.address, **GREEDY | fields, prompt="a")
        assert (found[0], found[1]["code"]) == (404, "adapter_not_found")


def test_bad_requests_disturb_nobody(worker: Worker) -> None:
    whole = count(worker)
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(count, worker) for _ in range(3)]
        bad = [
            pool.submit(refusal, worker.address, **GREEDY | f) for f, _, _ in BAD_REQUESTS.values()
        ]
        assert all(future.result().token_ids == whole.token_ids for future in good)
        assert all(future.result() for future in bad)
    wait_idle(worker)


def test_unknown_fields_are_ignored_on_llavas_route(worker: Worker) -> None:
    assert count(worker, max_token=3, conv_mode="vicuna_v1").finished.reason == "stop"


# ---------------------------------------------------------------- slots and cancellation


def test_two_streams_at_once_are_the_same_as_alone(worker: Worker) -> None:
    alone = count(worker)
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(count, worker) for _ in range(4)]
        assert all(future.result().token_ids == alone.token_ids for future in together)


def test_leaving_early_frees_the_slot(worker: Worker) -> None:
    for _ in range(5):
        with streaming(
            worker.address, **GREEDY, messages=user("Count from 1 to 100."), max_new_tokens=800
        ) as events:
            next(events)
        wait_idle(worker)
    assert count(worker).finished.reason == "stop"


def test_leaving_before_the_first_token_frees_the_slot(worker: Worker) -> None:
    long = "word " * 600
    for wait_s in (0.001, 0.002, 0.004):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(
                worker.address + PATH,
                json=GREEDY | {"prompt": long, "max_new_tokens": 2000},
                timeout=httpx.Timeout(5, read=wait_s),
            )
        wait_idle(worker)


def test_leaving_while_a_picture_is_decoded_frees_the_slot(worker: Worker) -> None:
    """A picture that takes longer to decode than its client stays."""
    noise = Image.effect_noise((500, 500), 60).convert("RGB")
    slow = encoded(noise.resize((6000, 6000)), "JPEG")
    for wait_s in (0.01, 0.05, 0.15):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(
                worker.address + PATH,
                json=GREEDY | {"prompt": "<image>", "images": [slow], "max_new_tokens": 2000},
                timeout=httpx.Timeout(10, read=wait_s),
            )
        wait_idle(worker)
    assert count(worker).finished.reason == "stop"


# ---------------------------------------------------------------- L6: draining


def test_draining_finishes_what_runs_and_accepts_nothing(worker: Worker) -> None:
    whole = count(worker)
    with streaming(worker.address, **GREEDY, messages=user(COUNT), max_new_tokens=60) as events:
        seen = [next(events)]
        httpx.post(f"{worker.address}/drain")
        try:
            status_code, error = refusal(worker.address, **GREEDY, prompt="a")
            assert (status_code, error["code"]) == (503, "draining")
            assert httpx.get(f"{worker.address}/healthz").status_code == 503
            seen += events
        finally:
            httpx.post(f"{worker.address}/resume")
    assert Answer(tuple(seen)).token_ids == whole.token_ids
    assert count(worker).token_ids == whole.token_ids


# ---------------------------------------------------------------- L8: resuming


def test_resuming_goes_on_as_if_nothing_had_happened(worker: Worker) -> None:
    whole = count(worker)
    ids = whole.token_ids
    for cut in sorted({1, 2, 5, len(ids) // 2, len(ids) - 1}):
        rest = count(worker, resume_token_ids=ids[:cut])
        assert rest.token_ids == ids[cut:], f"cut at {cut}"
        assert rest.finished.reason == whole.finished.reason
        assert rest.finished.completion_tokens == len(ids)
        assert whole.text.endswith(rest.text)


def test_resuming_what_has_ended_ends_at_once(worker: Worker) -> None:
    whole = count(worker, max_new_tokens=12)
    again = count(worker, max_new_tokens=12, resume_token_ids=whole.token_ids)
    assert again.token_ids == []
    assert again.text == ""
    assert again.finished == whole.finished.model_copy(
        update={
            "prompt_tokens": again.finished.prompt_tokens,
            "cached_tokens": again.finished.cached_tokens,
        }
    )


def test_a_stop_string_across_the_seam_is_found(worker: Worker) -> None:
    whole = count(worker)
    texts = [event.text for event in whole.events if isinstance(event, Delta)]
    cut = next(n for n in range(6, 40) if texts[n] and texts[n - 1])
    before = "".join(texts[:cut])
    stop = (before + texts[cut])[len(before) - 1 : len(before) + len(texts[cut])]
    if stop in before:
        pytest.skip("this answer repeats itself around the seam")
    straight = count(worker, stop=stop)
    rest = count(worker, stop=stop, resume_token_ids=whole.token_ids[:cut])
    assert rest.finished.reason == "stop"
    assert straight.text.endswith(rest.text)
    assert rest.finished.completion_tokens == straight.finished.completion_tokens


@pytest.mark.parametrize("token_id", [-1, 2**20, 2**70])
def test_what_no_model_can_have_said_is_not_resumed(worker: Worker, token_id: int) -> None:
    fields = GREEDY | {"prompt": "a", "resume_token_ids": [token_id]}
    assert refusal(worker.address, **fields)[1]["code"] == "invalid_request"


PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 2.0},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 0.3},
    {"presence_penalty": -0.7, "frequency_penalty": 1.1, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_resuming_with_penalties(worker: Worker, penalties: dict[str, float]) -> None:
    asked = UNDECIDED | penalties
    if worker.kind == "echo":
        del asked["regex"]
    whole = ask(worker.address, **asked)
    ids = whole.token_ids
    for cut in sorted({1, 3, len(ids) // 2, len(ids) - 1} - {len(ids)}):
        rest = ask(worker.address, **asked, resume_token_ids=ids[:cut])
        assert rest.token_ids == ids[cut:], f"cut at {cut}"


# ---------------------------------------------------------------- sampling


def test_a_seed_is_kept_or_refused(worker: Worker) -> None:
    fields = {"temperature": 1.5, "seed": 7}
    if status(worker).capabilities.seed:
        assert count(worker, **fields).token_ids == count(worker, **fields).token_ids
    else:
        assert refusal(worker.address, **GREEDY | fields, prompt="a")[1]["code"] == "unsupported"


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_p": 0},
        {"top_p": 1e-6},
        {"min_p": 1},
    ],
    ids=str,
)
def test_the_narrowest_sampling_is_greedy(worker: Worker, fields: dict[str, float]) -> None:
    assert count(worker, temperature=1.0, **fields).token_ids == count(worker).token_ids


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_a_penalty_changes_a_repetitive_answer(worker: Worker, penalties: dict[str, float]) -> None:
    if worker.kind == "echo":
        pytest.skip("the echo engine does not sample")
    plain = ask(worker.address, **UNDECIDED)
    assert plain.text == "red " * 12
    assert ask(worker.address, **UNDECIDED, **penalties).text != plain.text


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2**30 - 1},
        {"repetition_penalty": 0.001, "presence_penalty": 2, "frequency_penalty": -2},
        {"min_p": 5e-324, "top_p": 5e-324, "temperature": 100},
        {"temperature": 5e-324},
    ],
    ids=str,
)
def test_no_number_that_is_taken_breaks_anything(worker: Worker, fields: dict[str, float]) -> None:
    asked = GREEDY | {"temperature": 1, "prompt": "hello", "max_new_tokens": 4} | fields
    assert isinstance(ask(worker.address, **asked).events[-1], Finished)


@pytest.mark.parametrize(
    "fields", [{"top_k": 2**30}, {"top_k": 2**70}, {"repetition_penalty": 1e-40}], ids=str
)
def test_numbers_that_would_overflow_are_refused(worker: Worker, fields: dict[str, float]) -> None:
    assert refusal(worker.address, **GREEDY | fields, prompt="a")[1]["code"] == "invalid_request"


# ---------------------------------------------------------------- pictures


def test_pictures_are_seen(worker: Worker) -> None:
    if worker.kind == "echo":
        pytest.skip("the echo engine sees nothing")
    for colour in ("red", "blue", "green"):
        answer = ask(
            worker.address,
            **GREEDY,
            messages=user("<image>What color is the circle?"),
            images=[encoded(picture("circle", colour))],
            max_new_tokens=32,
        )
        assert colour in answer.text.lower()


def test_a_picture_costs_prompt_tokens(worker: Worker) -> None:
    fields: dict[str, Any] = {"messages": user("<image>What is this?"), "max_new_tokens": 4}
    with_picture = ask(worker.address, **GREEDY, **fields, images=[GOOD])
    without = ask(worker.address, **GREEDY, messages=user("What is this?"), max_new_tokens=4)
    tokens = status(worker).image_tokens
    assert tokens > 0
    assert with_picture.finished.prompt_tokens - without.finished.prompt_tokens == tokens


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_formats_and_modes(worker: Worker, image_format: str, mode: str) -> None:
    if (image_format, mode) in {("JPEG", "P"), ("WEBP", "P"), ("WEBP", "L")}:
        pytest.skip("no such files")
    image = encoded(picture().convert(mode), image_format)
    data_uri = f"data:image/{image_format.lower()};base64,{image}"
    answer = ask(worker.address, **GREEDY, prompt="<image> a", images=[data_uri], max_new_tokens=2)
    assert answer.finished.completion_tokens


# ---------------------------------------------------------------- the status


def test_the_status_is_llavas_and_more(worker: Worker) -> None:
    count(worker)
    found = status(worker)
    assert found.model_names == (MODEL, *(f"{MODEL}:{name}" for name in found.adapters))
    assert found.kind == worker.kind
    assert found.speed > 1, "it measures itself"
    assert found.capacity
    assert found.context_length
    assert found.queue_length == found.running + found.waiting


def test_a_flushed_cache_is_empty_and_only_a_cache_can_be_flushed(worker: Worker) -> None:
    url = f"{worker.address}/flush_cache"
    wait_idle(worker)
    if status(worker).cache is None:
        refused = httpx.post(url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "unsupported")
        return
    count(worker)
    assert count(worker).finished.cached_tokens > 0
    with streaming(worker.address, **GREEDY, messages=user(COUNT), max_new_tokens=900) as events:
        next(events)
        refused = httpx.post(url, timeout=30)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    wait_idle(worker)

    def flushed() -> httpx.Response | None:
        # One who has left is still an answer of the engine for the length of a step.
        response = httpx.post(url, timeout=30)
        return response if response.status_code == 200 else None

    until(flushed, what="it is idle")
    cache = status(worker).cache
    assert cache is not None
    assert cache.used_tokens <= 1, "no more than a probe's"
    assert count(worker).finished.cached_tokens <= 1
    after = until(lambda: held(worker), what="the cache holds what was computed since")
    assert after < 1000


def held(worker: Worker) -> int:
    cache = status(worker).cache
    assert cache is not None
    return cache.used_tokens


def test_health_says_when_the_engine_last_made_a_token(worker: Worker) -> None:
    count(worker)
    found = httpx.get(f"{worker.address}/healthz").json()
    assert found["state"] == "ready"
    if worker.kind == "sglang":
        assert 0 <= found["token_age_s"] < 30


def test_every_worker_has_metrics(worker: Worker) -> None:
    count(worker)
    text = httpx.get(f"{worker.address}/metrics").text
    assert "tandem_worker_generation_tokens_total" in text


def test_a_storm_of_leavers_leaves_nothing_behind(worker: Worker) -> None:
    """Fifty clients that leave at random points; then the worker is idle and answers as before."""
    whole = count(worker)
    source = random.Random(5)
    points = [source.randrange(0, 30) for _ in range(50)]

    def leave(after: int) -> None:
        with streaming(worker.address, **GREEDY, messages=user(COUNT), max_new_tokens=60) as events:
            for _, event in zip(range(after), events, strict=False):
                assert not isinstance(event, Failed)

    with ThreadPoolExecutor(5) as pool:
        for future in [pool.submit(leave, point) for point in points]:
            future.result()
    wait_idle(worker)
    assert count(worker).token_ids == whole.token_ids
    assert all(a <= b for a, b in pairwise([0, status(worker).running]))
