"""Settings of a process: flags, the environment, defaults."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    CliSuppress,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
)

from protocol import logs
from transport.addresses import check_collector
from transport.credentials import TOKEN_VARIABLE, is_loopback
from transport.exits import EXIT_USAGE, complain, usage_error
from transport.helptext import HelpFormatter

_TOKEN_CHARACTERS = 16
_MAKE_TOKEN = (
    f"export {TOKEN_VARIABLE}=$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')"
)

log = logging.getLogger("tandem")

T = TypeVar("T")


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


Several = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split)]
"""A flag that may be given several times, or once with commas, as the environment has it."""


class ProcessSettings(BaseSettings):
    """Settings of every process: flag over environment (``TANDEM_...``) over default."""

    model_config = SettingsConfigDict(
        env_prefix="TANDEM_",
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        nested_model_default_partial_update=False,
    )

    cluster_token: CliSuppress[SecretStr | None] = Field(
        default=None, description="what processes and operators of this cluster show each other"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least severe entry that is logged"
    )
    log_json: bool = Field(default=False, description="log one JSON object a line")
    otlp_endpoint: str | None = Field(
        default=None,
        description="OpenTelemetry collector to send traces to, such as http://127.0.0.1:4318",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        return None if value is None else check_collector(value)

    @field_validator("cluster_token")
    @classmethod
    def _hard_to_guess(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        token = value.get_secret_value()
        if len(token) < _TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()):
            raise ValueError(
                f"a token has at least {_TOKEN_CHARACTERS} characters, all printable ASCII; "
                f"make one: {_MAKE_TOKEN}"
            )
        return value

    @field_validator("host")
    @classmethod
    def _guarded(cls, value: str, info: ValidationInfo) -> str:
        # A token that is refused is missing from info, and has a sentence of its own.
        if not is_loopback(value) and info.data.get("cluster_token", "refused") is None:
            raise ValueError(
                f"other machines could reach {value or 'every address'} and command this process; "
                f"give the controller, the workers and yourself one token first: {_MAKE_TOKEN}"
            )
        return value

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the process."""
        return is_loopback(self.host)


S = TypeVar("S", bound=ProcessSettings)


def parse(cls: type[S], argv: Sequence[str] | None = None, **extra: Any) -> S:
    """The settings from ``argv`` (the command line when ``None``) and the environment.

    A bad flag or value ends the process with a sentence and exit code 2. Logging is configured
    as they say, and they are logged once, secrets masked.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    secrets = [name for name, field in cls.model_fields.items() if _HIDDEN in field.metadata]
    for flag in (_flag(name) for name in secrets):
        if any(arg == flag or arg.startswith(f"{flag}=") for arg in args):
            variable = flag[2:].replace("-", "_").upper()
            usage_error(
                f"{flag} is no flag, as everybody on this machine could read it; "
                f"export TANDEM_{variable} instead."
            )
    try:
        source: CliSettingsSource[S] = CliSettingsSource(cls, formatter_class=HelpFormatter)
        settings = CliApp.run(cls, cli_args=args, cli_settings_source=source, **extra)
    except ValidationError as exc:
        for error in exc.errors(include_url=False, include_input=False):
            name = str(error["loc"][0]) if error["loc"] else ""
            shown = f"TANDEM_{name.upper()}" if name in secrets else _flag(name)
            text = error["msg"].removeprefix("Value error, ")
            complain(f"{shown if name else 'settings'}: {text}")
        raise SystemExit(EXIT_USAGE) from None
    except SettingsError as exc:
        usage_error(str(exc))
    logs.configure(level=settings.log_level, as_json=settings.log_json)
    # model_dump_json masks SecretStr fields; an address may hold a password, too.
    log.info("settings %s", re.sub(r"//[^/@\"]+@", "//***@", settings.model_dump_json()))
    return settings


_HIDDEN = argparse.SUPPRESS  # how CliSuppress marks a field


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
