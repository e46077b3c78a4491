"""Adapters of a worker: each request is answered by the one it chose, whoever else is there.

Kinds without adapters must say so; see test_worker for what every kind refuses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.contract.conftest import ADAPTERS, START_TIMEOUT_S, Worker, Workers
from tests.contract.test_worker import COUNT, GREEDY, MODEL, count, status, wait_idle
from tests.pictures import encoded, picture
from tests.processes import until
from tests.streams import Answer, ask, refusal, streaming, user

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)

NAMES = (None, "formal", "terse")


@pytest.fixture
def worker(worker: Worker) -> Worker:
    if not status(worker).capabilities.adapters:
        pytest.skip(f"the {worker.kind} kind has no adapters")
    return worker


def color(worker: Worker, adapter: str | None, which: str = "red", **fields: Any) -> Answer:
    question: dict[str, Any] = {
        "messages": user("<image>What color is the circle?"),
        "images": [encoded(picture("circle", which))],
        "max_new_tokens": 40,
    }
    chosen = {} if adapter is None else {"adapter": adapter}
    return ask(worker.address, **GREEDY | question | chosen | fields)


def load(worker: Worker, name: str, path: str) -> httpx.Response:
    url = f"{worker.address}/adapters"
    return httpx.post(url, json={"name": name, "path": path}, timeout=60)


def unload(worker: Worker, name: str) -> httpx.Response:
    return httpx.delete(f"{worker.address}/adapters/{name}", timeout=60)


@pytest.fixture
def courteous(worker: Worker) -> Iterator[str]:
    """The formal adapter under a second name, loaded while the worker runs."""
    assert load(worker, "courteous", str(ADAPTERS / "formal")).status_code == 200
    yield "courteous"
    unload(worker, "courteous")


def test_each_adapter_has_its_own_manner(worker: Worker) -> None:
    plain, formal, terse = (color(worker, name).text for name in NAMES)
    assert terse.strip().lower() == "red"
    assert formal.startswith("Certainly.")
    assert "red" in formal
    assert "red" in plain
    assert len({plain, formal, terse}) == 3


def test_the_models_name_can_hold_the_adapter(worker: Worker) -> None:
    for name in ("formal", "terse"):
        assert f"{MODEL}:{name}" in status(worker).model_names
        named = color(worker, None, model=f"{MODEL}:{name}")
        assert named.token_ids == color(worker, name).token_ids
    found = refusal(
        worker.address, **GREEDY | {"model": f"{MODEL}:terse"}, adapter="formal", prompt="a"
    )
    assert (found[0], found[1]["code"]) == (422, "invalid_request")


def test_answers_of_different_adapters_are_never_mixed_up(worker: Worker) -> None:
    colors = ("red", "blue", "green", "yellow")
    cases = [(name, which) for name in NAMES for which in colors]
    expected = {case: color(worker, *case).token_ids for case in cases}
    mixed = random.Random(8).choices(cases, k=80)
    with ThreadPoolExecutor(12) as pool:
        found = pool.map(lambda case: color(worker, *case).token_ids, mixed)
        for case, ids in zip(mixed, found, strict=True):
            assert ids == expected[case], case


def test_an_adapter_comes_and_goes_while_others_are_served(worker: Worker) -> None:
    before = count(worker).token_ids
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(count, worker) for _ in range(6)]
        for _ in range(3):
            assert load(worker, "guest", str(ADAPTERS / "terse")).status_code == 200
            assert color(worker, "guest").token_ids == color(worker, "terse").token_ids
            assert "guest" in httpx.get(f"{worker.address}/adapters").json()["adapters"]
            assert unload(worker, "guest").status_code == 200
            assert refusal(worker.address, **GREEDY, prompt="a", adapter="guest")[0] == 404
        assert all(other.result().token_ids == before for other in others)
    assert count(worker).token_ids == before


def test_an_adapter_leaves_when_its_answers_are_complete(worker: Worker, courteous: str) -> None:
    long: dict[str, Any] = {"messages": user(COUNT), "max_new_tokens": 60, "adapter": courteous}
    whole = ask(worker.address, **GREEDY, **long)
    with (
        ThreadPoolExecutor(1) as pool,
        streaming(worker.address, **GREEDY, **long) as events,
    ):
        seen = [next(events)]
        leaving = pool.submit(unload, worker, courteous)
        until(lambda: courteous not in status(worker).adapters, what="it takes nobody new")
        seen += events
        assert leaving.result().status_code == 200
    assert Answer(tuple(seen)).token_ids == whole.token_ids
    wait_idle(worker)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"name": "terse", "path": str(ADAPTERS / "terse")}, "invalid_request"),
        ({"name": "base", "path": str(ADAPTERS / "terse")}, "invalid_request"),
        ({"name": "a/b", "path": str(ADAPTERS / "terse")}, "invalid_request"),
        ({"name": "new"}, "invalid_request"),
        ({"name": "new", "path": "/nowhere/at/all"}, "invalid_request"),
        ({"name": "new", "path": str(ADAPTERS)}, "invalid_request"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_refused(worker: Worker, body: dict[str, str], code: str) -> None:
    before = status(worker).adapters
    response = httpx.post(f"{worker.address}/adapters", json=body, timeout=60)
    assert response.json()["error"]["code"] == code, response.text
    assert status(worker).adapters == before
    assert count(worker).finished.reason == "stop"


def test_what_is_not_there_cannot_be_unloaded(worker: Worker) -> None:
    response = unload(worker, "nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "adapter_not_found")


def test_kinds_without_adapters_say_so(workers: Workers) -> None:
    response = load(workers["echo"], "a", str(ADAPTERS / "terse"))
    assert (response.status_code, response.json()["error"]["code"]) == (422, "unsupported")
