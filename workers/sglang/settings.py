"""Settings of the SGLang worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliSuppress, SettingsConfigDict

from transport.addresses import check_address
from workers.settings import CheckpointSettings


class SglangSettings(CheckpointSettings):
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
    max_adapter_rank: int | None = Field(
        default=None,
        ge=1,
        description="largest rank of an adapter that can be loaded while it runs; that of the "
        "largest --adapter when not given, and without any none can be loaded",
    )
    max_cached_tokens: int | None = Field(
        default=None,
        ge=512,
        description="size of the cache in tokens; on a CPU 20000 when not given, on a GPU what "
        "SGLang's --mem-fraction-static leaves",
    )
    tp: int = Field(default=1, ge=1, description="GPUs that share each layer (tensor parallel)")
    dp: int = Field(default=1, ge=1, description="copies of the model (data parallel)")
    nnodes: int = Field(default=1, ge=1, description="machines that serve one model together")
    node_rank: int = Field(
        default=0, ge=0, description="which of them this is; only 0 takes requests and registers"
    )
    dist_init_addr: str | None = Field(
        default=None, description="host:port of machine 0 at which the others find it"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the checkpoint"
    )
    start_timeout_s: float = Field(
        default=1800.0, gt=0, description="longest time the server may take to become ready"
    )
    hang_timeout_s: float = Field(
        default=120.0, gt=0, description="longest time without a step while requests run"
    )
    health_interval_s: float = Field(
        default=30.0, gt=0, description="idle time after which the server must make one token"
    )
    sglang_args: CliSuppress[tuple[str, ...]] = Field(
        default=(), description="what follows -- on the command line: SGLang's own flags"
    )

    @model_validator(mode="after")
    def _nodes(self) -> SglangSettings:
        if self.node_rank >= self.nnodes:
            raise ValueError(
                f"--node-rank {self.node_rank} is none of --nnodes {self.nnodes}: they count from 0"
            )
        if self.nnodes > 1 and self.dist_init_addr is None:
            raise ValueError("--nnodes needs --dist-init-addr host:port, the same on every machine")
        return self

    @model_validator(mode="after")
    def _adapters_in_one_server(self) -> SglangSettings:
        if (self.adapter or self.max_adapter_rank) and (self.dp > 1 or self.nnodes > 1):
            raise ValueError(
                "SGLang loads adapters on one machine only, and with --dp 1; start several workers"
            )
        return self

    @field_validator("sgl_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)
