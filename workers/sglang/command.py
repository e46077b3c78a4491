"""How the server is started: its flags, its environment, the device. Plain functions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from protocol.errors import OutOfMemory
from workers.sglang.request import GRAMMAR_BACKEND
from workers.sglang.server.launch import PARENT_PID
from workers.sglang.settings import SglangSettings
from workers.sglang.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
CPU_CAPACITY = 32
"""Requests in a batch on a CPU; SGLang's own default there is in the thousands."""

CPU_CACHED_TOKENS = 20_000
"""Size of the cache on a CPU, where SGLang would take most of the machine's memory."""

CPU_PREFILL_CHUNK = 512
"""Prompt tokens computed between two looks at new and aborted requests, on a CPU: with 1024 an
aborted request of the embedded model runs on for up to 0.3 s, with 256 long prompts take twice
as long."""

VIEW_ARCHITECTURE = "LlavaOriginalForConditionalGeneration"
"""The class that serves a view of a checkpoint in LLaVA's original format."""

Device = Literal["cpu", "cuda"]


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device to use; asks the driver, so it may take some 100 ms."""
    if wanted != "auto":
        return wanted
    return "cuda" if _cuda_devices() > 0 or os.path.exists("/dev/kfd") else "cpu"


def _cuda_devices() -> int:
    """GPUs the CUDA driver shows this process (``CUDA_VISIBLE_DEVICES`` included)."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this CPU, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def cpu_dtype(wanted: str, flags: Iterable[str]) -> str:
    """The precision on a CPU: emulated, bfloat16 is several times slower than float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def server_args(
    settings: SglangSettings, *, device: Device, dtype: str, port: int, adapter_rank: int = 0
) -> list[str]:
    """SGLang's flags. The user's come last, so that they win.

    With an ``adapter_rank`` there is room for LoRA adapters up to that rank.
    """
    args = [
        *("--model-path", settings.model_path),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--dtype", dtype),
        *("--log-level-http", "warning"),
        *("--sampling-defaults", "openai"),  # a request means what it says
        "--incremental-streaming-output",
        *("--grammar-backend", GRAMMAR_BACKEND),
    ]
    if settings.trust_remote_code:
        args.append("--trust-remote-code")
    if settings.limit_model_concurrency is not None:
        args += ["--max-running-requests", str(settings.limit_model_concurrency)]
    cached_tokens = cache_tokens(settings, device)
    if cached_tokens is not None:
        args += ["--max-total-tokens", str(cached_tokens)]
    args += _parallel(settings)
    if adapter_rank:
        args += [
            "--enable-lora",
            *("--max-lora-rank", str(adapter_rank)),
            *("--lora-target-modules", *TARGETS),
            # Else one that no longer fits into the batch waits for as long as others come.
            *("--lora-drain-wait-threshold", "1"),
        ]
    if device == "cpu":
        if adapter_rank:
            args += ["--lora-backend", "torch_native"]
        if settings.limit_model_concurrency is None:
            args += ["--max-running-requests", str(CPU_CAPACITY)]
        args += [
            *("--device", "cpu"),
            # The fraction is a bound on all memory in use, also other programs'; the size of the
            # cache is given by the other flag.
            *("--mem-fraction-static", "0.9"),
            *("--chunked-prefill-size", str(CPU_PREFILL_CHUNK)),
            "--sleep-on-idle",  # else an idle scheduler takes a whole core
            "--skip-server-warmup",  # the shell warms up
        ]
    return [*args, *settings.sglang_args]


def cache_tokens(settings: SglangSettings, device: Device) -> int | None:
    """The size of the cache; ``None``: what SGLang makes of the memory of the GPUs."""
    return settings.max_cached_tokens or (CPU_CACHED_TOKENS if device == "cpu" else None)


def check_cache_fits(values: int, tokens: int, dtype: str, available_bytes: int | None) -> None:
    """Whether the memory of this machine holds a cache of ``tokens`` with ``values`` each.

    Raises:
        OutOfMemory: it does not. The server would be killed when the cache fills up.
    """
    needed_bytes = values * tokens * (4 if dtype == "float32" else 2)
    if available_bytes is not None and needed_bytes > available_bytes:
        per_token = needed_bytes / tokens
        raise OutOfMemory(
            f"A cache of {tokens} tokens takes {needed_bytes / 1e9:.1f} GB, and "
            f"{available_bytes / 1e9:.1f} GB of memory are free.",
            remedy=f"Give --max-cached-tokens less than {int(available_bytes / per_token)}.",
        )


def available_bytes() -> int | None:
    """Memory that programs can still have on this machine, if it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found[1]) * 1024


def _parallel(settings: SglangSettings) -> list[str]:
    """How the model is spread over GPUs and machines."""
    args: list[str] = []
    if settings.tp > 1:
        args += ["--tp-size", str(settings.tp)]
    if settings.dp > 1:
        args += ["--dp-size", str(settings.dp)]
        # In turn, one copy would queue while another has room; requests wait in the controller.
        args += ["--load-balance-method", "total_requests"]
    if settings.nnodes > 1:
        args += ["--nnodes", str(settings.nnodes), "--node-rank", str(settings.node_rank)]
        args += ["--dist-init-addr", str(settings.dist_init_addr)]
    return args


def of_view(settings: SglangSettings, view: str) -> SglangSettings:
    """``settings`` of a server that loads ``view`` in place of a checkpoint in LLaVA's format.

    SGLang's warm-up asks in text, of which only Tandem makes tokens there; the shell warms up.
    """
    sglang_args = ("--skip-server-warmup", *settings.sglang_args)
    return settings.model_copy(update={"model_path": view, "sglang_args": sglang_args})


def server_environment(
    inherited: Mapping[str, str], *, device: Device, temporary: str, parent_pid: int
) -> dict[str, str]:
    """The server's environment: the worker's, and what SGLang takes from nowhere else."""
    environment = dict(inherited)
    # Its three processes import the same 7000 modules: without bytecode each compiles them anew,
    # which doubles the time to start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    paths = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": temporary,
        PARENT_PID: str(parent_pid),
        # Else the server spends 65 s on core dumps before it dies.
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        # Where there is no /ready yet, /health stands for it, and shall not generate.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "workers.sglang.server.models",
        "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "workers.sglang.server.processors",
        # The server calls itself.
        "NO_PROXY": ",".join(filter(None, [inherited.get("NO_PROXY"), "127.0.0.1,localhost"])),
    }
    environment["no_proxy"] = environment["NO_PROXY"]
    environment.pop("SGLANG_USE_CPU_ENGINE", None)
    if device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # The first request with a repetition penalty stopped everyone for 17 s of compilation.
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Threads that spin for their next share of work take the cores from the other processes:
        # with two cores a token of a small model took six times as long.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment
