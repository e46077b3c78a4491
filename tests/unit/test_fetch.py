"""Which addresses are of the world outside."""

from __future__ import annotations

import pytest

from controller.fetch import is_address, is_public
from controller.settings import ControllerSettings

INSIDE = (
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("0.0.0.0", "255.255.255.255", "224.0.0.1", "192.0.2.1"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1"),
)


@pytest.mark.parametrize("ip", INSIDE)
def test_inside(ip: str) -> None:
    assert not is_public(ip)


@pytest.mark.parametrize("ip", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_outside(ip: str) -> None:
    assert is_public(ip)


@pytest.mark.parametrize("image", ["http://a/b", "HTTPS://a/b", "file:///etc", "ftp://x"])
def test_an_address(image: str) -> None:
    assert is_address(image)


@pytest.mark.parametrize("image", ["data:image/png;base64,AA==", "iVBORw0KGgo=", "", "a" * 99])
def test_an_image(image: str) -> None:
    assert not is_address(image)


@pytest.mark.parametrize(
    "host", ["example.org", "*.example.org", "*", "10.0.0.7", "::1", "[::1]", "Images.Lab"]
)
def test_hosts(host: str) -> None:
    settings = ControllerSettings(image_url_host=(host,))
    assert settings.image_url_host == (host.lower().strip("[]"),)


@pytest.mark.parametrize("host", ["", "http://example.org", "example.org/x", "a b", "*x.org"])
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        ControllerSettings(image_url_host=(host,))


@pytest.mark.parametrize("alias", ["gpt-4o", "=x", "x=", "a=b,a=c", "a=b,b=c"])
def test_what_is_no_alias(alias: str) -> None:
    with pytest.raises(ValueError, match=r"alias"):
        ControllerSettings(alias=alias)  # type: ignore[arg-type]
