"""Whose key it is, what it may use, and what it has used."""

from __future__ import annotations

import hmac

import pytest
from pydantic import SecretStr

from controller import callers, keys
from controller.callers import KeyCaller, KeyRing
from controller.keys import ApiKey, KeyFile
from protocol.errors import Forbidden, RateLimited
from transport import credentials

ALIASES = {"gpt-4": "llava"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ring(clock: Clock, *entries: ApiKey) -> KeyRing:
    return KeyRing(KeyFile(keys=entries), clock, lambda name: ALIASES.get(name, name))


def holder(*models: str) -> KeyCaller:
    key, entry = keys.mint("ann", models=models)
    found = ring(Clock(), entry).find(key)
    assert found is not None
    return found


def test_a_key_is_found_by_itself_alone() -> None:
    made = [keys.mint(name) for name in ("ann", "bob", "eve")]
    known = ring(Clock(), *(entry for _, entry in made))
    for key, entry in made:
        found = known.find(key)
        assert found is not None
        assert found.name == entry.name
        assert known.find(entry.sha256) is None, "what the file says opens nothing"
    assert known.find(None) is None
    assert known.find("") is None
    assert known.find("tdm-é") is None


def test_each_key_is_compared_whatever_is_presented(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(given: str, known: str) -> bool:
        compared.append(known)
        return hmac.compare_digest(given, known)

    class Watched:
        compare_digest = staticmethod(compare)

    made = [keys.mint(name) for name in ("ann", "bob", "eve")]
    known = ring(Clock(), *(entry for _, entry in made))
    monkeypatch.setattr(callers, "hmac", Watched)
    for presented in (made[0][0], made[2][0], "wrong", None):
        compared.clear()
        known.find(presented)
        assert compared == [entry.sha256 for _, entry in made]


@pytest.mark.parametrize(
    ("models", "model", "adapter", "allowed"),
    [
        ((), "anything", None, True),
        (("llava",), "llava", None, True),
        (("llava",), "other", None, False),
        (("llava",), "llava:formal", None, True),
        (("llava",), "llava", "formal", True),
        (("llava:formal",), "llava:formal", None, True),
        (("llava:formal",), "llava", "formal", True),
        (("llava:formal",), "llava", None, False),
        (("llava:formal",), "llava", "terse", False),
        (("llava",), "gpt-4", None, True),
        (("gpt-4",), "llava", None, True),
        (("other",), "gpt-4", None, False),
    ],
)
def test_models(models: tuple[str, ...], model: str, adapter: str | None, allowed: bool) -> None:
    caller = holder(*models)
    assert caller.allows(model, adapter) is allowed
    if not allowed:
        with pytest.raises(Forbidden) as caught:
            caller.check_model(model, adapter)
        assert caught.value.param == "model"


def test_requests_a_minute() -> None:
    clock = Clock()
    key, entry = keys.mint("ann", requests_per_minute=2)
    caller = ring(clock, entry).find(key)
    assert caller is not None
    caller.admit()
    caller.admit()
    with pytest.raises(RateLimited) as caught:
        caller.admit()
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now = 30
    caller.admit()


def test_tokens_a_minute_are_known_afterwards() -> None:
    clock = Clock()
    key, entry = keys.mint("ann", tokens_per_minute=60, requests_per_minute=100)
    caller = ring(clock, entry).find(key)
    assert caller is not None
    caller.admit()
    caller.charge(90)
    with pytest.raises(RateLimited) as caught:
        caller.admit()
    assert caught.value.retry_after_s == pytest.approx(31)
    clock.now = 31
    caller.admit()


def test_a_new_file_forgets_nothing_of_what_was_used() -> None:
    clock = Clock()
    key, entry = keys.mint("ann", requests_per_minute=1)
    known = ring(clock, entry)
    running = known.find(key)
    assert running is not None
    running.admit()
    other, added = keys.mint("bob")
    known.replace(KeyFile(keys=(entry, added)))
    again = known.find(key)
    assert again is not None
    with pytest.raises(RateLimited):
        again.admit()
    assert known.find(other) is not None
    known.replace(KeyFile(keys=(entry.model_copy(update={"requests_per_minute": 5}),)))
    more = known.find(key)
    assert more is not None
    more.admit()
    known.replace(KeyFile())
    assert known.find(key) is None


def test_the_cluster_token_is_compared_by_its_digest() -> None:
    secret = credentials.Secret(SecretStr("s" * 32))
    assert secret.matches("s" * 32)
    for wrong in ("s" * 31, "s" * 33, "", None, "é"):
        assert not secret.matches(wrong)
