"""Who may ask: the callers a controller knows, what each may use, and what it has used."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from pathlib import Path

from controller import keys
from controller.keys import ApiKey, KeyFile, KeyFileError
from controller.rates import Bucket
from protocol.errors import Forbidden, RateLimited
from protocol.messages import split_model
from transport.credentials import digest

log = logging.getLogger(__name__)

_LOOK_S = 1.0  # between two looks at the key file


class Caller:
    """Whoever sent a request. Without a key: anybody, or an operator, and both without limits."""

    def __init__(self, *, operator: bool = False) -> None:
        self.name: str | None = None  # of its key
        self.operator = operator

    def allows(self, model: str, adapter: str | None = None) -> bool:
        """Whether it may use ``model``, with ``adapter`` if one is asked for beside it."""
        return True

    def check_model(self, model: str, adapter: str | None = None) -> None:
        """Raises:
        Forbidden: this caller may not use ``model``.
        """
        if not self.allows(model, adapter):
            raise Forbidden(
                f"The key {self.name!r} may not use the model {model!r}.",
                remedy="GET /v1/models lists those it may use.",
                param="model",
            )

    def admit(self) -> None:
        """Count one request.

        Raises:
            RateLimited: too many in this minute, or too many tokens; says when to come again.
        """

    def charge(self, tokens: int) -> None:
        """Count the tokens of a request that has ended, those of its prompt and of its answer."""


NOBODY = Caller()
"""Anybody: who was not asked for a key, or not let in."""


class KeyCaller(Caller):
    """The holder of a key."""

    def __init__(
        self,
        key: ApiKey,
        requests: Bucket | None,
        tokens: Bucket | None,
        clock: Callable[[], float],
        resolve: Callable[[str], str],
    ) -> None:
        super().__init__()
        self.name: str = key.name
        self.key = key
        self.requests = requests
        self.tokens = tokens
        self._models = frozenset(resolve(model) for model in key.models)
        self._clock = clock
        self._resolve = resolve

    def allows(self, model: str, adapter: str | None = None) -> bool:
        if not self._models:
            return True
        model = self._resolve(model)
        names = {model, split_model(model)[0]}  # who may use a model may use its adapters
        if adapter is not None:
            names.add(f"{model}:{adapter}")
        return bool(names & self._models)

    def admit(self) -> None:
        now = self._clock()
        if self.tokens is not None and (wait_s := self.tokens.wait_s(1, now)):
            raise RateLimited(
                f"The key {self.name!r} has used its {self.tokens.per_minute} tokens a minute.",
                retry_after_s=wait_s,
            )
        if self.requests is not None:
            if wait_s := self.requests.wait_s(1, now):
                raise RateLimited(
                    f"The key {self.name!r} may ask {self.requests.per_minute} times a minute.",
                    retry_after_s=wait_s,
                )
            self.requests.take(1, now)

    def charge(self, tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.take(tokens, self._clock())


class KeyRing:
    """The holders of all keys. ``replace`` keeps what those that stay have used."""

    def __init__(
        self, file: KeyFile, clock: Callable[[], float], resolve: Callable[[str], str]
    ) -> None:
        """``resolve`` makes an alias the name of its model."""
        self._clock = clock
        self._resolve = resolve
        self._callers: dict[str, KeyCaller] = {}
        self.replace(file)

    def __len__(self) -> int:
        return len(self._callers)

    def replace(self, file: KeyFile) -> None:
        """Know the keys of ``file``, and no others."""
        known = self._callers
        self._callers = {key.name: self._caller(key, known.get(key.name)) for key in file.keys}

    def find(self, presented: str | None) -> KeyCaller | None:
        """Whose key it is. Each is compared, so that the time taken tells nothing."""
        given = digest(presented or "")
        found = None
        for caller in self._callers.values():
            if hmac.compare_digest(given, caller.key.sha256):
                found = caller
        return found

    def _caller(self, key: ApiKey, known: KeyCaller | None) -> KeyCaller:
        requests, tokens = (None, None) if known is None else (known.requests, known.tokens)
        return KeyCaller(
            key,
            self._bucket(key.requests_per_minute, requests),
            self._bucket(key.tokens_per_minute, tokens),
            self._clock,
            self._resolve,
        )

    def _bucket(self, per_minute: int | None, known: Bucket | None) -> Bucket | None:
        if per_minute is None:
            return None
        if known is not None and known.per_minute == per_minute:
            return known
        return Bucket(per_minute, self._clock())


async def follow(path: Path, ring: KeyRing) -> None:
    """Have ``ring`` know the keys of the file as it changes, until cancelled.

    A file that is bad or gone changes nothing, and is complained of once.
    """
    seen: object = await asyncio.to_thread(_version, path)
    while True:
        await asyncio.sleep(_LOOK_S)
        version = await asyncio.to_thread(_version, path)
        if version == seen:
            continue
        seen = version
        try:
            ring.replace(await asyncio.to_thread(keys.load, path))
        except KeyFileError as exc:
            log.error("the old API keys stay valid: %s", exc)
        else:
            log.info("API keys read again: %d", len(ring))
            if (complaint := await asyncio.to_thread(keys.exposed, path)) is not None:
                log.warning("%s", complaint)


def _version(path: Path) -> object:
    """Changes with the file; ``None`` while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
