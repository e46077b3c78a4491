"""Flags over environment over default; a mistake is a sentence and exit code 2."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from controller.settings import ControllerSettings
from transport.settings import parse
from workers.echo.settings import EchoSettings
from workers.settings import WorkerSettings


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """``parse`` configures logging; put it back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_flag_over_environment_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(ControllerSettings, []).port == 21001
    monkeypatch.setenv("TANDEM_PORT", "5")
    assert parse(ControllerSettings, []).port == 5
    assert parse(ControllerSettings, ["--port", "6"]).port == 6


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prot", "1"], "--prot"),
        (["--por", "1"], "--por"),
        (["--port", "many"], "--port: Input should be a valid integer"),
        (["--port", "70000"], "--port: Input should be less than or equal to 65535"),
        (["--dispatch-method", "best"], "--dispatch-method: Input should be 'lottery'"),
        (["--register-at", "localhost"], "--register-at: 'localhost' is not an address like"),
    ],
)
def test_a_mistake_is_a_sentence(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(ControllerSettings, argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_settings_are_frozen() -> None:
    settings = parse(ControllerSettings, [])
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_several_controllers() -> None:
    two = ["--controller-address", "http://a:1/", "--controller-address", "http://b:2"]
    assert parse(WorkerSettings, two).controller_address == ("http://a:1", "http://b:2")
    comma = ["--controller-address", "http://a:1,http://b:2"]
    assert parse(WorkerSettings, comma).controller_address == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/models/llava/", "llava"),
        ("C:\\models\\llava-13b", "llava-13b"),
    ],
)
def test_the_models_name_is_the_last_part_of_its_path(path: str, name: str) -> None:
    assert parse(WorkerSettings, ["--model-path", path]).name == name


def test_the_settings_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        parse(EchoSettings, ["--delay-s", "0.5"])
    assert sum("delay_s" in record.getMessage() for record in caplog.records) <= 1
