"""Addresses as settings and logs have them."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

from transport.credentials import TOKEN_VARIABLE


def address_of(sock: socket.socket, *, scheme: str = "http") -> str:
    """``http://host:port`` at which ``sock`` is reached from this machine."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_address(address: str, *, https: bool = False, password: bool = False) -> str:
    """``address`` without its trailing slash; ``https`` and ``password`` say what it may have.

    Raises:
        ValueError: it is not ``http://host:port``.
    """
    parts = urlsplit(address.rstrip("/"))
    try:
        valid = bool(parts.hostname) and (
            (parts.scheme == "http" and parts.port is not None)
            or (https and parts.scheme == "https" and parts.port != 0)
        )
    except ValueError:  # a port that is no number, or above 65535
        valid = False
    if not valid:
        raise ValueError(f"{bare(address)!r} is not an address like http://127.0.0.1:21001")
    if not password and parts.netloc != bare(address).partition("://")[2].partition("/")[0]:
        raise ValueError(f"leave the password out of {bare(address)}, and set {TOKEN_VARIABLE}")
    return address.rstrip("/")


def bare(address: str) -> str:
    """``address`` as it may be shown: without a user and a password."""
    return re.sub(r"//[^/@]*@", "//", address)


def check_collector(endpoint: str) -> str:
    """``endpoint`` as it is.

    Raises:
        ValueError: it is not an address of HTTP, or holds a password, which would be logged.
    """
    parts = urlsplit(endpoint)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or above 65535
        valid = False
    if "@" in parts.netloc:
        raise ValueError("give a password in OTEL_EXPORTER_OTLP_HEADERS, not in the address")
    if not valid or parts.query or parts.fragment:
        raise ValueError(f"{endpoint!r} is not an address like http://127.0.0.1:4318")
    return endpoint
