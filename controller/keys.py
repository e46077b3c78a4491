"""API keys: the file that holds them, as digests, with what each may do.

A key is ``tdm-`` and 256 random bits. Nobody can try them all, so a fast digest hides a key as well
as a slow one would, and a slow one, paid for every request, would let strangers keep the controller
busy. What matters is that the file tells no key, and that comparing does not tell how near one is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from transport.credentials import digest

PREFIX = "tdm-"
DEFAULT_FILE = Path("tandem-keys.json")
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"


class KeyFileError(Exception):
    """The key file cannot be read, written or used as asked; a sentence for a person."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ApiKey(_Strict):
    """One key. A rate that is ``None`` has no limit; no ``models`` means all of them."""

    name: str = Field(pattern=f"^{NAME}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    models: tuple[str, ...] = ()
    created: AwareDatetime

    @field_validator("models")
    @classmethod
    def _named(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if any(not model.strip() for model in models):
            raise ValueError("a model's name is empty")
        return models


class KeyFile(_Strict):
    """The whole file."""

    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _no_twins(self) -> KeyFile:
        names = [key.name for key in self.keys]
        if twins := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two keys are named {twins[0]}")
        if len({key.sha256 for key in self.keys}) < len(names):
            raise ValueError("two entries have the same sha256")
        return self

    def named(self, name: str) -> ApiKey | None:
        return next((key for key in self.keys if key.name == name), None)


def mint(
    name: str,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    models: tuple[str, ...] = (),
) -> tuple[str, ApiKey]:
    """A new key, and what the file keeps of it.

    Raises:
        KeyFileError: the name or a limit cannot be.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        return key, ApiKey(
            name=name,
            sha256=digest(key),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            models=models,
            created=datetime.now(UTC).replace(microsecond=0),
        )
    except ValidationError as exc:
        raise KeyFileError(f"{_sentence(exc)}.") from None


def parse(text: str, source: str) -> KeyFile:
    """The validated file.

    Raises:
        KeyFileError: it names ``source``, the line or the field, and what is wrong there.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as exc:
        raise KeyFileError(f"{source}, line {exc.lineno}: not valid JSON: {exc.msg}.") from exc
    except RecursionError:
        raise KeyFileError(f"{source}: not a key file: it is nested too deeply.") from None
    try:
        return KeyFile.model_validate(found)
    except ValidationError as exc:
        raise KeyFileError(f"{source}: {_sentence(exc)}.") from None


def load(path: Path) -> KeyFile:
    """Read the file.

    Raises:
        KeyFileError: it cannot be read or used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KeyFileError(
            f"There is no key file {path}; "
            f"`python -m controller keys add NAME --api-key-file {path}` makes one."
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise KeyFileError(f"{path} cannot be read: {_reason(exc)}.") from exc
    return parse(text, str(path))


def save(path: Path, file: KeyFile) -> None:
    """Write the file for its owner alone; it is the old one or the new one at any moment.

    Raises:
        KeyFileError: it cannot be written.
    """
    text = json.dumps(file.model_dump(mode="json"), indent=2) + "\n"
    path = path.resolve()  # a link stays one
    try:
        # mkstemp's mode is 0600.
        descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise
    except OSError as exc:
        raise KeyFileError(f"{path} cannot be written: {_reason(exc)}.") from exc


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else changes the key files of this folder inside the block.

    Raises:
        KeyFileError: there is no such folder.
    """
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError as exc:
        raise KeyFileError(f"{path} cannot be written: {_reason(exc)}.") from exc
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def exposed(path: Path) -> str | None:
    """A sentence when others than its owner can read or change the file."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None
    if not mode & 0o077:
        return None
    return f"{path} can be read or changed by others (mode {mode:o}); chmod 600 {path}"


def _sentence(exc: ValidationError) -> str:
    """The first finding, without the value: it may be a key in the wrong place."""
    error = exc.errors(include_url=False, include_input=False)[0]
    place = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(step) for step in error["loc"]))
    text = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch" and place.endswith("name"):
        text = "a name is made of letters, digits, '.', '_', '@' and '-', 64 at most"
    return f"{place}: {text}" if place else text


def _reason(exc: OSError | UnicodeDecodeError) -> str:
    return (exc.strerror or str(exc)) if isinstance(exc, OSError) else "it is not UTF-8 text"
