"""What every request passes: who may come in, which browser it is, what pages may load."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "tandem_browser"
YEAR_S = 365 * 24 * 3600

POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio writes scripts into its page, and makes functions of templates.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' blob: data:",
        "media-src 'self' blob: data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
}


class Door:
    """Basic authentication (``--auth``), a cookie that names the browser, and safe headers."""

    def __init__(self, app: ASGIApp, users: Mapping[str, str], cookie_path: str) -> None:
        self._app = app
        self._users = users
        self._cookie_path = cookie_path or "/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/healthz":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        user = self._user(headers.get("authorization", "")) if self._users else None
        if self._users and user is None:
            refusal = PlainTextResponse(
                "This page asks for the user and password of --auth.\n",
                401,
                {"www-authenticate": 'Basic realm="Tandem", charset="UTF-8"'},
            )
            await refusal(scope, receive, send)
            return
        scope.setdefault("state", {})["user"] = user
        known = _cookie(headers.get("cookie", ""))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
                if not known and out.get("content-type", "").startswith("text/html"):
                    out.append("set-cookie", self._new_cookie())
            await send(message)

        await self._app(scope, receive, answer)

    def _user(self, authorization: str) -> str | None:
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        # Unknown users take as long as known ones.
        expected = self._users.get(user, secrets.token_hex())
        return user if secrets.compare_digest(password.encode(), expected.encode()) else None

    def _new_cookie(self) -> str:
        value = secrets.token_urlsafe(24)
        return (
            f"{COOKIE}={value}; Path={self._cookie_path}; Max-Age={YEAR_S}; HttpOnly; SameSite=Lax"
        )


def _cookie(header: str) -> bool:
    try:
        return COOKIE in SimpleCookie(header)
    except CookieError:
        return False


def owner(scope: Scope) -> str:
    """As ``pages.shared.owner_of``, for plain routes."""
    user = scope.get("state", {}).get("user")
    if user:
        return f"user:{user}"
    try:
        found = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(COOKIE)
    except CookieError:
        found = None
    return f"browser:{found.value}" if found else "nobody"
