"""Settings of the SGLang worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import CliSuppress, SettingsConfigDict

from transport.process import check_address
from workers.settings import WorkerSettings


class SglangSettings(WorkerSettings):
    """How the SGLang server is started, or which running one is used.

    What follows -- goes to SGLang untouched.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m workers.sglang")

    limit_model_concurrency: int | None = Field(
        default=None, ge=1, description="requests decoded at once; as many as SGLang batches"
    )
    sgl_endpoint: str | None = Field(
        default=None, description="a running SGLang server to use instead of starting one"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPUs where there are any, else the CPU"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the weights; auto: SGLang's choice on a GPU, on a CPU bfloat16 where it "
        "computes in it, else float32",
    )
    max_cached_tokens: int = Field(
        default=20_000, ge=512, description="size of the cache in tokens, on a CPU"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the checkpoint"
    )
    start_timeout_s: float = Field(
        default=1800.0, gt=0, description="longest time the server may take to become ready"
    )
    hang_timeout_s: float = Field(
        default=300.0, gt=0, description="longest silence of the server while requests run"
    )
    sglang_args: CliSuppress[tuple[str, ...]] = Field(
        default=(), description="what follows -- on the command line: SGLang's own flags"
    )

    @field_validator("sgl_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)
