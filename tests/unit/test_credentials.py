"""What a request presents, and where it comes from."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from protocol.errors import Forbidden
from transport import credentials


def scope(**headers: str) -> dict[str, Any]:
    named = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    return {"type": "http", "method": "POST", "path": "/x", "headers": named}


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("headers", "presented"),
    [
        ({}, None),
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer  abc "}, "abc"),
        ({"authorization": "Bearer "}, None),
        ({"authorization": basic("any:abc")}, "abc"),
        ({"authorization": basic("any:a:b")}, "a:b"),
        ({"authorization": basic("abc:")}, "abc"),
        ({"authorization": "Basic !!"}, None),
        ({"authorization": "Basic /w=="}, None),
        ({"authorization": "Digest abc"}, None),
        ({"x_api_key": "abc"}, "abc"),
        ({"authorization": "Bearer one", "x_api_key": "two"}, "one"),
    ],
)
def test_what_is_presented(headers: dict[str, str], presented: str | None) -> None:
    assert credentials.presented(scope(**headers)) == presented


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("gpu-1", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert credentials.is_loopback(host) is loopback


PAGE = "https://chat.example.org"


@pytest.mark.parametrize(
    ("origin", "host", "local", "ok"),
    [
        (None, "127.0.0.1:21001", True, True),
        ("http://127.0.0.1:21001", "127.0.0.1:21001", True, True),
        ("http://localhost:21001", "localhost:21001", True, True),
        ("http://[::1]:21001", "[::1]:21001", True, True),
        ("http://gpu-1:21001", "gpu-1:21001", False, True),
        ("https://gpu-1", "gpu-1:443", False, True),
        (PAGE, "gpu-1:21001", False, True),  # it is among the allowed
        # A stranger's name that its DNS points at this machine.
        ("http://evil.example:21001", "evil.example:21001", True, False),
        ("http://evil.example", "127.0.0.1:21001", True, False),
        ("http://127.0.0.1:9999", "127.0.0.1:21001", True, False),
        ("null", "127.0.0.1:21001", True, False),
        ("", "", True, False),
    ],
)
def test_origins(origin: str | None, host: str, local: bool, ok: bool) -> None:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    if ok:
        credentials.check_origin(scope(**headers), {PAGE}, local=local)
    else:
        with pytest.raises(Forbidden, match="another site"):
            credentials.check_origin(scope(**headers), {PAGE}, local=local)


def test_any_origin_when_all_are_allowed() -> None:
    credentials.check_origin(scope(origin="http://x", host="y"), {"*"}, local=True)


@pytest.mark.parametrize(
    ("headers", "direct"),
    [
        ({}, True),
        ({"host": "127.0.0.1:21001"}, True),
        ({"host": "localhost:21001"}, True),
        ({"host": "[::1]:21001"}, True),
        ({"host": "tandem.example.org"}, False),
        ({"host": "127.0.0.1", "x_forwarded_for": "1.2.3.4"}, False),
        ({"host": "127.0.0.1", "forwarded": "for=1.2.3.4"}, False),
        ({"host": "127.0.0.1", "x_real_ip": "1.2.3.4"}, False),
    ],
)
def test_direct(headers: dict[str, str], direct: bool) -> None:
    assert credentials.is_direct(scope(**headers)) is direct
