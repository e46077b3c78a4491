"""Settings that workers of every kind share; LLaVA's flags keep their names."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator

from protocol.messages import ADAPTER_NAME, BASE
from transport.addresses import check_address
from transport.settings import ProcessSettings, Several

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket-llava"


class WorkerSettings(ProcessSettings):
    """What the shell needs to know, whatever the engine."""

    model_path: str = Field(
        default=str(EMBEDDED_MODEL),
        description="directory or hub id of the checkpoint; the embedded model when not given",
    )
    model_name: str | None = Field(
        default=None, description="name clients use; the last part of --model-path when not given"
    )
    port: int | None = Field(
        default=None, ge=0, le=65535, description="port to listen on; a free one from 40000 up"
    )
    worker_address: str | None = Field(
        default=None, description="address the controller reaches this worker at, if not host:port"
    )
    worker_id: str | None = Field(
        default=None, description="name in tables and logs; kind and port when not given"
    )
    controller_address: Several[str] = Field(
        default=("http://127.0.0.1:21001",), description="controller to register at; may repeat"
    )
    no_register: bool = Field(default=False, description="serve without registering anywhere")
    heartbeat_s: float | None = Field(
        default=None, gt=0, description="seconds between heartbeats; as the controller says"
    )
    limit_model_concurrency: int | None = Field(
        default=None, ge=1, description="requests decoded at once"
    )
    max_waiting: int = Field(
        default=32, ge=0, description="requests that may wait for a free slot here"
    )
    max_wait_s: float = Field(default=30.0, gt=0, description="longest wait for a free slot")
    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="largest request body")
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="largest image, width times height"
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="time running requests get to finish on SIGTERM"
    )

    @field_validator("controller_address")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_address(address, https=True) for address in value)

    @field_validator("worker_address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value, password=True)

    @property
    def name(self) -> str:
        """The model's name: the given one, or the last part of its path (no backslash survives:
        LLaVA registered the whole path of a Windows user)."""
        if self.model_name is not None:
            return self.model_name
        return self.model_path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


class CheckpointSettings(WorkerSettings):
    """Those of a kind that loads a checkpoint."""

    conv_template: str | None = Field(
        default=None,
        description="LLaVA's conversation template (vicuna_v1, llava_v1, llava_llama_2, plain, "
        "...) for a checkpoint that brings none",
    )
    adapter: Several[str] = Field(
        default=(), description="name=path of a LoRA adapter requests can choose; may repeat"
    )

    @field_validator("adapter")
    @classmethod
    def _named_paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [item.partition("=")[0] for item in value]
        if any("=" not in item or not all(item.split("=", 1)) for item in value):
            raise ValueError("give each adapter as name=path")
        for name in names:
            if name == BASE or not re.fullmatch(ADAPTER_NAME, name):
                raise ValueError(
                    f"an adapter cannot be called {name!r}; letters, digits, '.', '_' and '-' "
                    f"make a name, and {BASE!r} is the model without an adapter"
                )
        if len(set(names)) < len(names):
            raise ValueError("two adapters have one name")
        return value

    @property
    def adapters(self) -> dict[str, str]:
        """Path by name of each ``--adapter``."""
        return dict(item.split("=", 1) for item in self.adapter)
