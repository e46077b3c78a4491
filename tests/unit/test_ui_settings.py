"""Settings of the chat page: who may be let in, and what is kept secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from transport.settings import parse
from ui.settings import UiSettings, default_data_dir


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(UiSettings, argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--host", "0.0.0.0"), "give --auth user:password as well"),
        (("--share",), "give --auth user:password as well"),
        (("--auth", "nobody"), "give user:password"),
        (("--root-path", "chat"), "should be a path like /chat"),
        (("--controller-address", "localhost"), "is not an address"),
    ],
)
def test_a_bad_setting_is_a_sentence(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused(capsys, *argv)


def test_with_a_password_others_may_come_in() -> None:
    settings = parse(UiSettings, ["--host", "0.0.0.0", "--auth", "ada:a:b", "--auth", "bob:c"])
    assert settings.users == {"ada": "a:b", "bob": "c"}
    assert "a:b" not in repr(settings)
    assert "a:b" not in settings.model_dump_json()


def test_the_clusters_token_goes_before_a_clients_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "key")
    token = parse(UiSettings, []).token
    assert token is not None
    assert token.get_secret_value() == "key"
    monkeypatch.setenv("TANDEM_CLUSTER_TOKEN", "t" * 40)
    token = parse(UiSettings, []).token
    assert token is not None
    assert token.get_secret_value() == "t" * 40


def test_data_is_kept_where_no_clean_up_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert default_data_dir() == Path("/somewhere/tandem/chat")
