"""pip's settings reach uv, which does not read them.

make test     or     .venv/bin/pytest tests/rules
"""

from __future__ import annotations

from requirements.install import uv_environment

PIP_CONFIG = """\
global.cert='/etc/ssl/lab.pem'
global.extra-index-url='file:///a/simple\\n file:///b/simple'
global.index-url='https://global.example/simple'
install.index-url='https://install.example/simple'
:env:.index-url='https://env.example/simple'
list.format='columns'
"""


def test_nothing_is_added_where_pip_has_no_settings() -> None:
    assert uv_environment("", {"HOME": "/home/me"}) == {"HOME": "/home/me"}


def test_settings_are_handed_over_the_closest_one_first() -> None:
    assert uv_environment(PIP_CONFIG, {}) == {
        "SSL_CERT_FILE": "/etc/ssl/lab.pem",
        "UV_DEFAULT_INDEX": "https://env.example/simple",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_what_is_set_for_uv_wins() -> None:
    ours = {"UV_DEFAULT_INDEX": "https://mine.example/simple"}
    assert uv_environment(PIP_CONFIG, ours)["UV_DEFAULT_INDEX"] == ours["UV_DEFAULT_INDEX"]
