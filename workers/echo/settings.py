"""Settings of the echo worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from protocol.errors import ERRORS
from workers.settings import WorkerSettings


class EchoSettings(WorkerSettings):
    """A worker that repeats its prompt, with faults on demand. Not for serving."""

    model_config = SettingsConfigDict(cli_prog_name="python -m workers.echo")

    model_name: str | None = Field(default="echo", description="name clients use")
    first_delay_s: float = Field(default=0.0, ge=0, description="wait before the first token")
    delay_s: float = Field(default=0.0, ge=0, description="wait before each further token")
    context_length: int = Field(default=8192, ge=1, description="tokens; one is a byte")
    fail_after: int | None = Field(
        default=None, ge=0, description="fail each request after this many tokens"
    )
    fail_with: Literal[tuple(ERRORS)] = Field(  # type: ignore[valid-type]
        default="engine_failed", description="error code of --fail-after"
    )
    die_after: int | None = Field(
        default=None, ge=0, description="the engine dies after this many tokens in all"
    )
