"""Settings of the chat page."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import CliSuppress, SettingsConfigDict

from transport.addresses import check_address
from transport.settings import ProcessSettings, Several


def default_data_dir() -> Path:
    """Where programs keep what their user made: outside the checkout, so no clean-up takes it."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "tandem" / "chat"


class UiSettings(ProcessSettings):
    """One page; it talks to one controller and keeps what people write in one folder."""

    model_config = SettingsConfigDict(cli_prog_name="python -m ui")

    port: int = Field(default=7860, ge=0, le=65535, description="port to listen on; 0: any")
    controller_address: str = Field(
        default="http://127.0.0.1:21001", description="the controller to talk to"
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="folder of the database (conversations, images, votes); when not given "
        "~/.local/share/tandem/chat",
    )
    title: str = Field(default="Tandem", min_length=1, max_length=40, description="shown on top")
    auth: Several[SecretStr] = Field(
        default=(),
        description="user:password that may come in; may repeat; nobody is asked if none",
    )
    root_path: str = Field(
        default="", description="path under which a proxy shows the page, such as /chat"
    )
    share: bool = Field(
        default=False,
        description="also open a public address through Gradio's tunnel; needs --auth",
    )
    max_image_bytes: int = Field(
        default=10 << 20, ge=1024, description="largest image that is sent as it is"
    )
    max_images: int = Field(default=8, ge=0, le=64, description="images in one message")
    api_key: CliSuppress[SecretStr | None] = Field(
        default=None, description="key for a controller that asks for one"
    )

    @field_validator("host")
    @classmethod
    def _guarded(cls, value: str, info: ValidationInfo) -> str:
        """Here it is --auth that guards, not the cluster's token: see below."""
        return value

    @field_validator("controller_address")
    @classmethod
    def _address(cls, value: str) -> str:
        return check_address(value)

    @field_validator("auth")
    @classmethod
    def _pairs(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for pair in value:
            user, _, password = pair.get_secret_value().partition(":")
            if not user or not password:
                raise ValueError("give user:password")
        return value

    @field_validator("root_path")
    @classmethod
    def _path(cls, value: str) -> str:
        path = value.rstrip("/")
        if path and not path.startswith("/"):
            raise ValueError("should be a path like /chat")
        return path

    @model_validator(mode="after")
    def _not_open_to_the_world(self) -> UiSettings:
        if not self.auth and (self.share or not self.local):
            open_to = "--share" if self.share else f"--host {self.host}"
            raise ValueError(
                f"{open_to} lets others in, and anyone could use the cluster: "
                "give --auth user:password as well"
            )
        return self

    @property
    def token(self) -> SecretStr | None:
        """What the page shows its controller: the cluster's token, or else a client's key."""
        return self.cluster_token or self.api_key

    @property
    def users(self) -> dict[str, str]:
        """The password of each user of ``--auth``."""
        pairs = [pair.get_secret_value().partition(":") for pair in self.auth]
        return {user: password for user, _, password in pairs}
