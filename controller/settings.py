"""Settings of the controller."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import CliSuppress, SettingsConfigDict

from transport.addresses import check_address
from transport.settings import ProcessSettings, Several
from transport.tls import Tls


class ControllerSettings(ProcessSettings):
    """One controller fronts all workers; clients talk to it and to nothing else.

    ``python -m controller keys --help`` tells how to make API keys.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m controller")

    port: int = Field(default=21001, ge=0, le=65535, description="port to listen on; 0: any")
    dispatch_method: Literal["lottery", "shortest_queue"] = Field(
        default="shortest_queue",
        description="lottery: in proportion to speed; shortest_queue: least work per speed",
    )
    heartbeat_s: float = Field(default=30.0, gt=0, description="seconds between heartbeats")
    expiry_s: float = Field(
        default=90.0, gt=0, description="a worker that is silent for so long is forgotten"
    )
    max_waiting: int = Field(default=1024, ge=0, description="requests that may wait for a slot")
    max_waiting_bytes: int = Field(
        default=1 << 30, ge=0, description="bytes of request bodies that may wait"
    )
    max_wait_s: float = Field(default=120.0, gt=0, description="longest wait for a slot")
    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="largest request body")
    max_images: int = Field(default=16, ge=0, description="images in one request")
    max_tokens: int = Field(
        default=131_072,
        ge=1,
        description="longest answer in tokens; also the limit of who names none on OpenAI's routes",
    )
    image_url_host: Several[str] = Field(
        default=(),
        description="host whose images OpenAI's clients may name by address (*.example.org: any "
        "below it, *: any public one); may repeat; none are fetched when not given",
    )
    max_image_bytes: int = Field(
        default=10 << 20, ge=1, description="largest image that is fetched from an address"
    )
    alias: Several[str] = Field(
        default=(), description="name=model, a further name of a model; may repeat"
    )
    connect_timeout_s: float = Field(default=2.0, gt=0, description="limit to reach a worker")
    first_event_timeout_s: float = Field(
        default=300.0, gt=0, description="limit to a worker's first token"
    )
    event_timeout_s: float = Field(
        default=30.0, gt=0, description="limit between two tokens of a stream"
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="time running requests get to finish on SIGTERM"
    )
    register_at: Several[str] = Field(
        default=(), description="controller to register at, as if this one were a worker"
    )
    own_address: str | None = Field(
        default=None, description="address --register-at reaches this at, if not host:port"
    )

    api_key_file: Path | None = Field(
        default=None, description="file of the API keys that clients need; none: they need no key"
    )
    cors_origins: Several[str] = Field(
        default=(), description="origin of web pages that may ask, or *; may repeat"
    )
    ssl_certfile: Path | None = Field(
        default=None, description="certificate (PEM) with its chain: https instead of http"
    )
    ssl_keyfile: Path | None = Field(default=None, description="its key, if not in --ssl-certfile")
    ssl_keyfile_password: CliSuppress[SecretStr | None] = Field(
        default=None, description="opens --ssl-keyfile"
    )

    @field_validator("register_at")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_address(address, https=True) for address in value)

    @field_validator("own_address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value, password=True)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            whole = f"{parts.scheme}://{parts.netloc}"
            if origin != "*" and (origin != whole or not parts.scheme or not parts.netloc):
                raise ValueError(f"{origin!r} is not an origin like https://chat.example.org")
        return value

    @model_validator(mode="after")
    def _https(self) -> Self:
        if self.ssl_certfile is None and self.ssl_keyfile is not None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        if self.ssl_certfile is not None and self.register_at:
            raise ValueError("--register-at is for a controller that speaks http, as workers do")
        return self

    @property
    def tls(self) -> Tls | None:
        """The files for https, if it is asked for."""
        if self.ssl_certfile is None:
            return None
        return Tls(self.ssl_certfile, self.ssl_keyfile, self.ssl_keyfile_password)

    @field_validator("alias")
    @classmethod
    def _named_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        pairs = [item.partition("=") for item in value]
        if any(not name or not model for name, _, model in pairs):
            raise ValueError("give each alias as name=model")
        names = [name for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError("one alias is given twice")
        if any(model in names for _, _, model in pairs):
            raise ValueError("an alias stands for a model, not for another alias")
        return value

    @field_validator("image_url_host")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9.-]+|\[?[0-9A-Fa-f:.]+\]?", host):
                raise ValueError(f"{host!r} is no host; give example.org, *.example.org or *")
        return tuple(host.lower().strip("[]") for host in value)

    @property
    def aliases(self) -> dict[str, str]:
        """The model by each ``--alias``."""
        return {name: model for name, _, model in (item.partition("=") for item in self.alias)}
