"""The gate before the controller's routes: who asks, and whether they may, before a body is read.

A route that is missing from the tables here is answered with ``not_found``: one that somebody adds
is closed until it says whom it is for.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.accounts import Accounts, Asker
from controller.callers import Caller, KeyRing
from protocol.errors import Forbidden, NotFound, TandemError, Unauthenticated
from transport import asgi, credentials


class RouteClass(StrEnum):
    """Whom a route is for."""

    OPEN = "open"  # anybody
    CLIENT = "client"  # those with a key, where keys are in use
    WORKER = "worker"  # processes of the cluster
    OPERATOR = "operator"  # whoever runs it
    UNKNOWN = "unknown"


_LOOKUPS = frozenset(
    {
        "/list_models",
        "/list_multimodal_models",
        "/list_language_models",
        "/get_worker_address",
        "/refresh_all_workers",  # LLaVA's and FastChat's clients send it first
        "/model_details",
        "/worker_get_conv_template",
    }
)
"""What clients POST that makes no answer, and is no request in the sense of a rate."""

_CLIENT = _LOOKUPS | {
    "/openapi.json",
    "/worker_generate_stream",
    "/worker_generate",
    "/worker_get_embeddings",
    "/count_token",
    "/test_connection",
}
_WORKER = frozenset({"/register_worker", "/receive_heart_beat", "/worker_get_status"})
_OPERATOR = frozenset({"/cluster", "/metrics"})


def classify(method: str, path: str) -> RouteClass:
    """Whom ``method`` on ``path`` is for."""
    if (method, path) == ("GET", "/healthz"):
        return RouteClass.OPEN
    if path in _OPERATOR or path.startswith("/workers/"):
        return RouteClass.OPERATOR
    if path in _WORKER:
        return RouteClass.WORKER
    # Another method on /healthz is refused like any mistake of a client.
    if path in _CLIENT or path.startswith(("/v1/", "/requests/")) or path == "/healthz":
        return RouteClass.CLIENT
    return RouteClass.UNKNOWN


def counts(method: str, path: str) -> bool:
    """Whether it is a request in the sense of ``requests_per_minute``."""
    return method == "POST" and path not in _LOOKUPS


def caller_of(scope: Scope) -> Caller:
    """Whom the gate has let in."""
    caller: Caller = scope["state"]["caller"]
    return caller


class Gate:
    """``app`` behind the checks. It adds nothing to a stream: what it decides, it decides before.

    ``keys`` is ``None`` where clients need none; ``token`` only where ``local`` says that no other
    machine can reach us.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        token: SecretStr | None,
        origins: Collection[str],
        local: bool,
        accounts: Accounts,
    ) -> None:
        self._app = app
        self._accounts = accounts
        self._keys = keys
        self._token = None if token is None else credentials.Secret(token)
        self._origins = frozenset(origin.lower() for origin in origins)
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request_id = asgi.request_id(scope)  # minted before anything can be refused
            try:
                scope["state"]["caller"] = self._admit(scope)
            except TandemError as error:
                method, path = scope["method"], scope["path"]
                if counts(method, path) and classify(method, path) is RouteClass.CLIENT:
                    self._accounts.refused(error, request_id, Asker.of(scope))
                await credentials.refuse(scope, send, error)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Caller:
        """Who asks.

        Raises:
            Unauthenticated, Forbidden: they may not.
            RateLimited: not so often.
            NotFound: there is no such route.
        """
        method, path = scope["method"], scope["path"]
        whom = classify(method, path)
        if whom is RouteClass.OPEN:
            return Caller()
        credentials.check_origin(scope, self._origins, local=self._local)
        if whom in (RouteClass.WORKER, RouteClass.OPERATOR):
            return self._operator(scope)
        caller = self._client(scope)
        if whom is RouteClass.UNKNOWN:
            raise NotFound(f"There is no route {path[:200]}.")
        if counts(method, path):
            caller.admit()
        return caller

    def _operator(self, scope: Scope) -> Caller:
        if self._token is None:
            credentials.check_direct(scope)
            return Caller(operator=True)
        presented = credentials.presented(scope)
        holder = None if self._keys is None else self._keys.find(presented)
        if self._token.matches(presented):
            return Caller(operator=True)
        if holder is not None:
            raise Forbidden("An API key does not open this route.", remedy=credentials.TOKEN_REMEDY)
        raise Unauthenticated(
            "This route wants the token of the cluster.", remedy=credentials.TOKEN_REMEDY
        )

    def _client(self, scope: Scope) -> Caller:
        presented = credentials.presented(scope)
        holder = None if self._keys is None else self._keys.find(presented)
        if self._token is not None and self._token.matches(presented):
            return Caller(operator=True)
        if self._keys is None:
            return Caller(operator=self._token is None and credentials.is_direct(scope))
        if holder is None:
            said = (
                "The API key is not known here."
                if presented
                else "This controller wants an API key."
            )
            raise Unauthenticated(said)
        return holder
