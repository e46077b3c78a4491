"""What may not be started: reachable by others and unguarded, or with files that are no good."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller import access
from controller.settings import ControllerSettings
from tests import certificate
from transport.addresses import bare, check_address
from transport.settings import ProcessSettings, parse
from workers.echo.settings import EchoSettings

TOKEN = "the-token-of-this-cluster"


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """``parse`` configures logging; put it back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def refused(cls: type[ProcessSettings], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which a start is refused."""
    with pytest.raises(SystemExit) as caught:
        parse(cls, argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("cls", [ControllerSettings, EchoSettings])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "gpu-1"])
def test_no_start_where_others_can_reach_it_without_a_token(
    cls: type[ProcessSettings],
    host: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = refused(cls, ["--host", host], capsys)
    assert error.startswith("error: --host: other machines could reach")
    assert "export TANDEM_CLUSTER_TOKEN=$(python3 -c" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("TANDEM_CLUSTER_TOKEN", TOKEN)
    settings = parse(cls, ["--host", host])
    assert settings.cluster_token is not None
    assert not settings.local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert parse(ControllerSettings, ["--host", host]).local


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "ä" * 20, "x" * 16 + "\n"])
def test_a_token_that_can_be_guessed_or_sent_wrongly(
    token: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_CLUSTER_TOKEN", token)
    for argv in ([], ["--host", "0.0.0.0"]):
        error = refused(ControllerSettings, argv, capsys)
        assert error.startswith("error: TANDEM_CLUSTER_TOKEN: a token has at least 16 characters")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--cluster-token", TOKEN],
        [f"--cluster-token={TOKEN}"],
        ["--ssl-keyfile-password", TOKEN],
    ],
)
def test_secrets_are_no_flags(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(ControllerSettings, argv, capsys)
    assert "export TANDEM_" in error
    assert TOKEN not in error


def test_secrets_are_not_shown(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TANDEM_CLUSTER_TOKEN", TOKEN)
    with pytest.raises(SystemExit):
        parse(ControllerSettings, ["--help"])
    told = capsys.readouterr().out
    assert "--api-key-file" in told
    for hidden in ("cluster-token", "keyfile-password", TOKEN):
        assert hidden not in told
    argv = ["--worker-address", f"http://any:{TOKEN}@127.0.0.1:40000"]
    settings = parse(EchoSettings, argv)
    assert settings.worker_address == argv[1]
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err + caplog.text


@pytest.mark.parametrize(
    ("address", "options", "ok"),
    [
        ("http://a:1", {}, True),
        ("https://a:1", {}, False),
        ("https://a:1", {"https": True}, True),
        ("https://tandem.example.org", {"https": True}, True),
        ("http://tandem.example.org", {"https": True}, False),
        ("http://any:secret@a:1", {}, False),
        ("http://any:secret@a:1", {"password": True}, True),
        ("ftp://any:secret@a:1", {"password": True}, False),
    ],
)
def test_addresses(address: str, options: dict[str, Any], ok: bool) -> None:
    if ok:
        assert check_address(address + "/", **options) == address
    else:
        with pytest.raises(ValueError, match=r"address like|leave the password out") as caught:
            check_address(address, **options)
        assert "secret" not in str(caught.value)
    assert "secret" not in bare(address)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ssl-keyfile", "k.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "c", "--register-at", "http://a:1"], "--register-at is for"),
        (["--cors-origins", "chat.example.org"], "is not an origin like https://"),
        (["--cors-origins", "https://chat.example.org/"], "is not an origin like https://"),
        (["--controller-address", "http://any:pw@a:1"], "leave the password out of http://a:1"),
    ],
)
def test_a_mistake_is_a_sentence(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cls = EchoSettings if argv[0] == "--controller-address" else ControllerSettings
    assert words in refused(cls, argv, capsys)


def test_several_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CORS_ORIGINS", "https://a.example,http://b.example:8080")
    monkeypatch.setenv("TANDEM_ALIAS", "a=b")
    settings = parse(ControllerSettings, [])
    assert settings.cors_origins == ("https://a.example", "http://b.example:8080")
    assert settings.alias == ("a=b",)
    assert parse(ControllerSettings, ["--alias", "c=d,e=f"]).alias == ("c=d", "e=f")


def test_several_origins() -> None:
    argv = ["--cors-origins", "https://a.example", "--cors-origins", "http://b.example:8080"]
    assert parse(ControllerSettings, argv).cors_origins == (argv[1], argv[3])


# ---------------------------------------------------------------- files


def prepared(capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        asyncio.run(access.prepare(ControllerSettings(**settings), str))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_certificates_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = certificate.make(tmp_path, name="one"), certificate.make(tmp_path, name="two")
    locked = certificate.make(tmp_path, name="locked", password="sesame")
    nowhere = tmp_path / "nowhere.pem"
    for cert, key, words in (
        (nowhere, one.key, "--ssl-certfile:"),
        (one.certificate, nowhere, "--ssl-keyfile:"),
        (one.certificate, two.key, "cannot be used"),
        (one.certificate, None, "cannot be used"),
        (locked.certificate, locked.key, "TANDEM_SSL_KEYFILE_PASSWORD"),
    ):
        assert words in prepared(capsys, ssl_certfile=cert, ssl_keyfile=key)
    good = ControllerSettings(ssl_certfile=one.certificate, ssl_keyfile=one.key)
    assert asyncio.run(access.prepare(good, str)) is None


def test_key_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    assert "There is no key file" in prepared(capsys, api_key_file=file)
    file.write_text('{"keys": [{"name": "a"}]}')
    assert f"--api-key-file: {file}: keys[0].sha256: Field required" in prepared(
        capsys, api_key_file=file
    )


def test_clients_without_keys_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    settings = ControllerSettings(host="0.0.0.0", cluster_token=TOKEN)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        asyncio.run(access.prepare(settings, str))
    assert "clients need no key" in caplog.text
