"""Settings of the Hugging Face worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from workers.settings import CheckpointSettings

BATCHED_CAPACITY = 16
THREADS_CAPACITY = 5
"""Requests decoded at once; LLaVA's default where each has a thread of its own."""


class HfSettings(CheckpointSettings):
    """How transformers loads and runs the model."""

    model_config = SettingsConfigDict(cli_prog_name="python -m workers.hf")

    limit_model_concurrency: int | None = Field(
        default=None,
        ge=1,
        description=f"requests decoded at once; {BATCHED_CAPACITY} in a batch, {THREADS_CAPACITY} "
        "in threads when not given",
    )
    model_base: str | None = Field(
        default=None,
        description="directory or hub id of the model that --model-path adapts: a LoRA adapter, "
        "or a LLaVA checkpoint of the projector alone",
    )
    merge: bool = Field(
        default=True,
        description="add the adapter of --model-path into the weights; --no-merge keeps it beside "
        "them, so that requests can choose the base",
    )
    load_4bit: bool = Field(
        default=False, description="weights of the language model in 4 bits (bitsandbytes NF4)"
    )
    load_8bit: bool = Field(
        default=False, description="weights of the language model in 8 bits (bitsandbytes int8)"
    )
    use_flash_attn: bool = Field(
        default=False,
        description="attention by the best flash-attn installed for this GPU; else PyTorch's own",
    )
    batching: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: requests decode together wherever the model allows it; off: each in a "
        "thread of its own, as in LLaVA",
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

    @model_validator(mode="after")
    def _one_precision(self) -> HfSettings:
        if self.load_4bit and self.load_8bit:
            raise ValueError("--load-4bit and --load-8bit exclude each other")
        return self
