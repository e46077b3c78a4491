"""The key file: what it holds, and one sentence for each mistake in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from controller import keys, keys_command
from controller.keys import KeyFile, KeyFileError

GOOD: dict[str, Any] = {"name": "a", "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"}


def document(*entries: dict[str, Any]) -> str:
    return json.dumps({"keys": [GOOD | entry for entry in entries]})


def test_a_key_is_kept_as_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, entry = keys.mint("ann", requests_per_minute=3, models=("llava",))
    keys.save(path, KeyFile(keys=(entry,)))
    assert keys.load(path).named("ann") == entry
    assert key.startswith("tdm-")
    assert len(key) == 4 + 43  # 256 bits
    assert key[4:] not in path.read_text()
    assert keys.mint("ann")[0] != key


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    before = os.umask(0)
    try:
        keys.save(path, KeyFile())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.exposed(path) is None
    path.chmod(0o644)
    assert "mode 644" in (keys.exposed(path) or "")
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    keys.save(link, KeyFile())
    assert link.is_symlink()
    assert real.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"keys": [\n  {,}\n]}', "k.json, line 2: not valid JSON"),
        ("[]", "k.json: Input should be"),
        ('{"key": []}', "k.json: key: Extra inputs are not permitted"),
        (document({"sha256": "tdm-secret"}), "keys[0].sha256: String should match"),
        (document({"requests_per_minute": 0}), "keys[0].requests_per_minute: Input should be"),
        (document({}, {"name": "b c"}), "keys[1].name: a name is made of letters"),
        (document({}, {"sha256": "1" * 64}), "two keys are named a"),
        (document({}, {"name": "b"}), "two entries have the same sha256"),
        (document({"models": ["llava", ""]}), "a model's name is empty"),
        (document({"created": "2026-01-01T00:00:00"}), "keys[0].created"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_mistake_is_a_sentence(text: str, words: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        keys.parse(text, "k.json")
    assert words in str(caught.value)
    assert "tdm-secret" not in str(caught.value)  # it may be a key in the wrong place


# ---------------------------------------------------------------- the commands


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = keys_command.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_add_list_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ("--api-key-file", str(tmp_path / "keys.json"))
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "9000", "--models", "a, b:c")
    code, out, err = run(capsys, "add", "ann", *file, *limits)
    assert code == 0
    assert out.startswith("tdm-")
    assert out.count("\n") == 1
    assert out.strip() not in err
    assert run(capsys, "add", "bob", *file)[0] == 0
    code, table, _ = run(capsys, "list", *file)
    assert code == 0
    assert table.splitlines()[1].split()[:4] == ["ann", "60", "9000", "a,b:c"]
    assert table.splitlines()[2].split("  ")[0] == "bob"
    assert out.strip() not in table
    assert run(capsys, "remove", "ann", *file)[0] == 0
    assert "ann" not in run(capsys, "list", *file)[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["add", "ann"], "has a key named ann already"),
        (["add", "no name"], "a name is made of letters"),
        (["add", "x", "--requests-per-minute", "0"], "requests_per_minute: Input should be"),
        (["remove", "zoe"], "no key named zoe; there are: ann"),
        (["list", "--api-key-file", "/nowhere/k.json"], "There is no key file /nowhere/k.json"),
        (["add", "x", "--api-key-file", "/nowhere/k.json"], "/nowhere/k.json cannot be written"),
    ],
    ids=str,
)
def test_a_mistake_of_a_command_is_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    words: str,
) -> None:
    monkeypatch.setenv("TANDEM_API_KEY_FILE", str(tmp_path / "keys.json"))
    assert run(capsys, "add", "ann")[0] == 0
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert words in err
    assert not out


def test_a_file_that_others_can_read_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    assert run(capsys, "add", "ann", "--api-key-file", str(path))[0] == 0
    path.chmod(0o640)
    assert "chmod 600" in run(capsys, "list", "--api-key-file", str(path))[2]
