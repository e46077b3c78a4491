"""Who asks: the secret a request presents, and the guard before routes that want the cluster's.

Secrets are compared by their digests, in constant time: how long a refusal takes tells nothing of
how near a guess came, nor how long the secret is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Collection
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import Forbidden, TandemError, Unauthenticated
from transport import asgi

TOKEN_VARIABLE = "TANDEM_CLUSTER_TOKEN"
TOKEN_REMEDY = f"Send the {TOKEN_VARIABLE} of this cluster as Authorization: Bearer TOKEN."
CHALLENGE = (b"www-authenticate", b"Bearer")

_PROXY_HEADERS = (b"x-forwarded-for", b"forwarded", b"x-real-ip")


class Secret:
    """A secret to compare with; only its digest is kept."""

    def __init__(self, secret: SecretStr) -> None:
        self._digest = digest(secret.get_secret_value())

    def matches(self, presented: str | None) -> bool:
        return hmac.compare_digest(digest(presented or ""), self._digest)


def digest(secret: str) -> str:
    """The SHA-256 of a secret, in hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def presented(scope: Scope) -> str | None:
    """The secret of a request: ``Authorization: Bearer X``, Basic with X as the password (which
    clients send that are given ``http://any:X@host:port``), or ``x-api-key: X``."""
    given = (asgi.header(scope, b"authorization") or b"").decode("latin-1")
    scheme, _, rest = given.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic":
        return _password(rest.strip())
    return (asgi.header(scope, b"x-api-key") or b"").decode("latin-1") or None


def presented_in_address(scope: Scope) -> str | None:
    """The secret of a client that was given ``http://any:X@host:port``."""
    given = (asgi.header(scope, b"authorization") or b"").decode("latin-1")
    scheme, _, rest = given.partition(" ")
    return _password(rest.strip()) if scheme.lower() == "basic" else None


def _password(encoded: str) -> str | None:
    try:
        user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return password or user or None


def headers(token: SecretStr | None) -> dict[str, str]:
    """What a process of the cluster sends so that another one knows it."""
    return {} if token is None else {"authorization": f"Bearer {token.get_secret_value()}"}


def from_environment() -> dict[str, str]:
    """``headers`` for programs without settings of their own: the token, if it is exported."""
    token = os.environ.get(TOKEN_VARIABLE)
    return headers(SecretStr(token) if token else None)


# ---------------------------------------------------------------- where a request comes from


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_origin(scope: Scope, allowed: Collection[str] = (), *, local: bool) -> None:
    """Refuse what a browser sends for a page of another site.

    ``local``: we listen on this machine only. A page's own host then has to be an address or
    ``localhost``: any other name may be one that a stranger's DNS points here.

    Raises:
        Forbidden: the page's origin is not ours and not among ``allowed``.
    """
    origin = asgi.header(scope, b"origin")
    if origin is None or "*" in allowed:
        return
    text = origin.decode("latin-1").lower()
    host = _host(scope)
    if text in allowed or (
        host and _netloc(text) == host and not (local and not _is_address_or_localhost(host))
    ):
        return
    raise Forbidden(
        "A page of another site may not ask here.",
        remedy="Start the controller with --cors-origins and the page's origin.",
    )


def check_direct(scope: Scope) -> None:
    """Refuse what did not come straight from this machine, where only that needs no token.

    Raises:
        Forbidden: a proxy has passed it on, or it was sent to a name that is not this machine's.
    """
    if not is_direct(scope):
        raise Forbidden(
            "This route is open to this machine only, and the request came through a proxy or to "
            "another name.",
            remedy=f"Set {TOKEN_VARIABLE} for the controller and the workers, and send it.",
        )


def is_direct(scope: Scope) -> bool:
    """Whether a request that reached a loopback address was sent by this machine, as it seems."""
    proxied = any(name in _PROXY_HEADERS for name, _ in scope["headers"])
    host = _host(scope)
    return not proxied and (not host or _is_address_or_localhost(host))


def _host(scope: Scope) -> str:
    host = (asgi.header(scope, b"host") or b"").decode("latin-1").lower()
    return host.removesuffix(":80").removesuffix(":443")


def _netloc(origin: str) -> str:
    _, _, netloc = origin.partition("://")
    return netloc.removesuffix(":80").removesuffix(":443")


def _is_address_or_localhost(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        ipaddress.ip_address(name)
    except ValueError:
        return host.partition(":")[0] == "localhost"
    return True


# ---------------------------------------------------------------- a worker's routes


class Guard:
    """A worker's routes: all but ``GET /healthz`` want the cluster's token, when there is one."""

    def __init__(self, app: ASGIApp, token: SecretStr | None, *, local: bool) -> None:
        self._app = app
        self._secret = None if token is None else Secret(token)
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except TandemError as error:
                await refuse(scope, send, error)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if (scope["method"], scope["path"]) == ("GET", "/healthz"):
            return
        check_origin(scope, local=self._local)
        if self._secret is not None and not self._secret.matches(presented(scope)):
            raise Unauthenticated(
                "This worker belongs to a cluster with a token.", remedy=TOKEN_REMEDY
            )


async def refuse(scope: Scope, send: Send, error: TandemError) -> None:
    """Answer with ``error`` before anything of the body has been read."""
    challenge = [CHALLENGE] if isinstance(error, Unauthenticated) else []
    await asgi.send_error(send, error, [*challenge, asgi.id_header(asgi.request_id(scope))])
