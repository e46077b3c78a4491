"""Settings of the Hugging Face worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from workers.settings import WorkerSettings


class HfSettings(WorkerSettings):
    """How transformers loads and runs the model."""

    model_config = SettingsConfigDict(cli_prog_name="python -m workers.hf")

    limit_model_concurrency: int = Field(
        default=5, ge=1, description="requests decoded at once, each in its own thread"
    )
    device: str = Field(
        default="auto",
        description="cpu, cuda, cuda:1, mps, ...; auto: CUDA where there is one, else the CPU",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the weights; auto: the checkpoint's own on an accelerator, on a CPU "
        "bfloat16 where it computes in it, else float32",
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the checkpoint"
    )
