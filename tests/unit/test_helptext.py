"""``--help`` of every process: words, and no value of Python's."""

from __future__ import annotations

import re

import pytest

from controller.settings import ControllerSettings
from transport.settings import ProcessSettings, parse
from ui.settings import UiSettings
from workers.echo.settings import EchoSettings
from workers.hf.settings import HfSettings
from workers.sglang.settings import SglangSettings


@pytest.mark.parametrize(
    "cls", [ControllerSettings, UiSettings, EchoSettings, HfSettings, SglangSettings]
)
def test_it_speaks_to_people(
    cls: type[ProcessSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(cls, ["--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 127.0.0.1)" in said
    assert "--host TEXT" in said
    assert "--port N" in said
    assert not re.findall(
        r"tuple\[|\[str|Secret|\(default: \(|default: (?:None|True|False|\))|\.0\)|factory", said
    )
    if "controller_address" in cls.model_fields:
        assert "(default: http://127.0.0.1:21001)" in said


def test_a_mistake_shows_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(ControllerSettings, ["--prot", "3"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "--alias TEXT" in said
    assert "unrecognized arguments: --prot 3" in said
