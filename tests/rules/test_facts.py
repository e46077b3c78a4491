"""What the embedded model is taught about Tandem is true of this checkout."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest

from controller.settings import ControllerSettings
from models.pocket import talk
from protocol.errors import ERRORS
from tests.rules.repository import ROOT
from transport.settings import ProcessSettings
from workers.hf.settings import HfSettings
from workers.settings import WorkerSettings
from workers.sglang.settings import SglangSettings

TEXTS = "\n".join(text for fact in talk.facts() for text in (fact.answer, *fact.seen))
DEFAULTS = {  # the question, and the number that its answer must name
    "Which port does the controller use?": ControllerSettings.model_fields["port"].default,
    "How often does a worker send a heartbeat?": ControllerSettings.model_fields[
        "heartbeat_s"
    ].default,
    "How long does a lease last?": ControllerSettings.model_fields["expiry_s"].default,
    "How many requests may wait in the controller?": ControllerSettings.model_fields[
        "max_waiting"
    ].default,
    "How long does a request wait for a slot?": ControllerSettings.model_fields[
        "max_wait_s"
    ].default,
    "How long may a stream be silent?": ControllerSettings.model_fields["event_timeout_s"].default,
    "How long does the controller wait for the first token?": ControllerSettings.model_fields[
        "first_event_timeout_s"
    ].default,
    "How long does the controller try to connect to a worker?": ControllerSettings.model_fields[
        "connect_timeout_s"
    ].default,
}


def answer(question: str) -> str:
    (found,) = (fact.answer for fact in talk.facts() if question in fact.seen)
    return found


def plainly(question: str) -> str:
    return re.sub(r"[?.!,:]", "", question.lower()).strip()


@pytest.mark.parametrize("question", DEFAULTS)
def test_default_values(question: str) -> None:
    assert re.search(rf"\b{DEFAULTS[question]:g}\b", answer(question))


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_is_explained(code: str) -> None:
    assert answer(f"What does {code} mean?").startswith(code)


@pytest.mark.parametrize("status", sorted({error.status for error in ERRORS.values()}))
def test_every_status_is_explained(status: int) -> None:
    assert f"tatus {status}" in answer(f"What does status {status} mean?")


def test_flags_exist() -> None:
    kinds = (ControllerSettings, WorkerSettings, HfSettings, SglangSettings, ProcessSettings)
    names = {name for settings in kinds for name in settings.model_fields}
    own = {f"--{name.replace('_', '-')}" for name in names} | {"--help", "--run-dir", "--json"}
    theirs = {"--tp-size"}  # SGLang's own, after --
    assert set(re.findall(r"(?<!\S)--[a-z][\w-]+", TEXTS)) <= own | theirs


def test_commands_and_routes_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    said = "\n".join(fact.answer for fact in talk.facts())
    assert set(re.findall(r"\bmake ([a-z]+)\b", said)) - {"alone"} <= targets
    for module in set(re.findall(r"python -m ([\w.]+)", TEXTS)):
        assert (ROOT / Path(*module.rstrip(".").split(".")) / "__main__.py").is_file(), module
    app = (ROOT / "controller" / "app.py").read_text()
    for route in set(re.findall(r"(?<!\S)(/[a-z][\w/]+\w)", TEXTS)):
        assert f'"{route.replace("/ID/", "/{worker_id}/")}"' in app, route


def test_nothing_is_said_twice_or_asked_twice() -> None:
    answers = [fact.answer for fact in talk.facts()]
    assert len(answers) == len(set(answers)) >= 150
    asked: dict[str, str] = {}
    trained: set[str] = set()
    for fact in talk.facts():
        for question in fact.seen:
            assert asked.setdefault(plainly(question), fact.answer) == fact.answer, question
            trained |= {plainly(talk.careless(question, Random(seed))) for seed in range(10)}
    for fact in talk.facts():
        kept_back = set(map(plainly, (*fact.unseen, *fact.unseen_forms)))
        assert not kept_back & (trained | asked.keys()), fact.answer
    assert all(len(fact.seen) >= 4 and fact.unseen for fact in talk.facts())
    outside = [set(talk.elsewhere(which)) for which in ("train", "unseen")]
    assert not outside[0] & outside[1]
