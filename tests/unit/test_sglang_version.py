"""What is said of an SGLang that Tandem is not tested with.

make test     or     .venv/bin/pytest tests/unit/test_sglang_version.py
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from protocol.errors import EngineFailed, OutOfMemory
from workers.sglang.server import version
from workers.sglang.server.version import OLDEST, PINNED

OLDER = ["0.5.17", "0.5.9", "0.4.10.post2", "0.0.0.dev1"]
KNOWN = [OLDEST, "0.5.18.post1", "0.5.20rc1", PINNED, f"{PINNED}.post1", f"{PINNED}+cu129"]
NEWER = ["0.5.24", "0.5.100", "0.6.0", "1.0.0rc1", "nightly"]


@pytest.mark.parametrize(
    ("given", "side"),
    [*((v, -1) for v in OLDER), *((v, 0) for v in KNOWN), *((v, 1) for v in NEWER)],
)
def test_versions_are_compared_by_their_numbers(given: str, side: int) -> None:
    assert version.compare(given) == side


@pytest.mark.parametrize("known", KNOWN)
def test_nothing_is_said_of_a_known_version(known: str, caplog: pytest.LogCaptureFixture) -> None:
    version.check(known)
    assert version.doubt(known) is None
    assert caplog.messages == []


@pytest.mark.parametrize("older", OLDER)
def test_an_older_version_is_refused_with_what_to_install(older: str) -> None:
    with pytest.raises(EngineFailed, match=older) as refused:
        version.check(older)
    assert f"sglang=={PINNED}" in refused.value.remedy


@pytest.mark.parametrize("newer", NEWER)
def test_a_newer_version_is_tried_with_a_warning(
    newer: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        version.check(newer)
    (message,) = caplog.messages
    assert newer in message
    assert f"sglang=={PINNED}" in message


def test_without_sglang_there_is_no_start() -> None:
    with pytest.raises(EngineFailed, match="not installed"):
        version.check(None)


def test_a_failed_start_of_an_unknown_version_names_it() -> None:
    failure = EngineFailed("The SGLang server ended with code 1.")
    explained = version.explain(failure, "0.5.24")
    assert explained.message == failure.message
    assert "0.5.24" in explained.remedy
    assert version.explain(failure, PINNED) is failure
    assert version.explain(failure, None) is failure
    no_room = OutOfMemory("The SGLang server ended with code 1.")
    assert version.explain(no_room, "0.5.24") is no_room


def test_what_sglang_would_skip_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "extension_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sound.py").touch()
    (package / "torn.py").write_text("from json import name_of_the_last_version\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="name_of_the_last_version"):
        version.import_all([package.name])
    assert f"{package.name}.sound" in sys.modules
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        monkeypatch.delitem(sys.modules, name)
