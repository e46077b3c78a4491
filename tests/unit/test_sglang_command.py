"""The server's command line and environment."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.errors import OutOfMemory
from workers.sglang.__main__ import split
from workers.sglang.checkpoint import cache_values
from workers.sglang.command import (
    Device,
    check_cache_fits,
    cpu_dtype,
    server_args,
    server_environment,
)
from workers.sglang.request import GRAMMAR_BACKEND
from workers.sglang.settings import SglangSettings


def args(device: Device = "cpu", **given: Any) -> list[str]:
    settings = SglangSettings(**{"model_path": "M", **given})
    return server_args(settings, device=device, dtype="float32", port=1234)


def value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_the_server_is_reached_from_this_machine_only() -> None:
    assert value(args(), "--host") == "127.0.0.1"
    assert value(args(), "--port") == "1234"


def test_a_cpu_gets_what_it_cannot_do_without() -> None:
    argv = args("cpu", max_cached_tokens=999)
    assert value(argv, "--max-total-tokens") == "999"
    assert value(argv, "--max-running-requests") == "32"
    assert "--sleep-on-idle" in argv


def test_the_cache_on_a_cpu_is_bounded() -> None:
    assert value(args("cpu"), "--max-total-tokens") == "20000"
    assert value(args("cuda", max_cached_tokens=999), "--max-total-tokens") == "999"


def test_a_cache_that_memory_does_not_hold_is_refused_with_what_would_fit() -> None:
    values = 2 * 32 * 32 * 128  # LLaVA-1.5-7B
    check_cache_fits(values, 20_000, "bfloat16", 11 * 10**9)
    check_cache_fits(values, 20_000, "bfloat16", None)
    check_cache_fits(0, 20_000, "bfloat16", 1)
    with pytest.raises(OutOfMemory, match=r"20000 tokens takes 21\.0 GB, and 11\.0 GB") as refused:
        check_cache_fits(values, 20_000, "float32", 11 * 10**9)
    assert refused.value.remedy == "Give --max-cached-tokens less than 10490."


def test_there_is_room_for_adapters_when_somebody_may_bring_one() -> None:
    assert "--enable-lora" not in args()
    for device, backend in (("cpu", ["torch_native"]), ("cuda", [])):
        argv = server_args(
            SglangSettings(model_path="M"),
            device=device,  # type: ignore[arg-type]
            dtype="float32",
            port=1,
            adapter_rank=24,
        )
        assert "--enable-lora" in argv
        assert value(argv, "--max-lora-rank") == "24"
        assert {"q_proj", "down_proj"} < set(argv)
        assert [value(argv, flag) for flag in argv if flag == "--lora-backend"] == backend


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}, 2 * 2 * 32),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
          "num_key_value_heads": 1, "head_dim": 10}, 2 * 2 * 10),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
          "kv_lora_rank": 8}, 0),
        ({}, 0),
    ],
)  # fmt: skip
def test_what_the_cache_holds_for_a_token(config: dict[str, int], values: int) -> None:
    assert cache_values(SimpleNamespace(**config)) == values


def test_one_machine_and_one_gpu_need_no_flags() -> None:
    argv = args("cuda")
    for flag in ("--tp-size", "--dp-size", "--nnodes", "--node-rank", "--dist-init-addr"):
        assert flag not in argv


def test_several_gpus_and_machines() -> None:
    given = {"tp": 8, "dp": 2, "nnodes": 2, "node_rank": 1, "dist_init_addr": "10.0.0.1:5000"}
    argv = args("cuda", **given)
    assert value(argv, "--tp-size") == "8"
    assert value(argv, "--dp-size") == "2"
    assert value(argv, "--load-balance-method") == "total_requests"
    assert value(argv, "--nnodes") == "2"
    assert value(argv, "--node-rank") == "1"
    assert value(argv, "--dist-init-addr") == "10.0.0.1:5000"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"node_rank": 1}, "is none of --nnodes 1"),
        ({"nnodes": 2}, "--nnodes needs --dist-init-addr"),
    ],
)
def test_machines_that_cannot_find_each_other(given: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SglangSettings(**given)  # type: ignore[arg-type]


def test_a_gpu_keeps_the_defaults_of_sglang() -> None:
    argv = args("cuda")
    for flag in ("--device", "--attention-backend", "--max-total-tokens", "--max-running-requests"):
        assert flag not in argv


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_grammars_are_those_of_the_other_kinds(device: Device) -> None:
    assert value(args(device), "--grammar-backend") == GRAMMAR_BACKEND


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_limit_is_given_once(device: Device) -> None:
    argv = args(device, limit_model_concurrency=7)
    assert argv.count("--max-running-requests") == 1
    assert value(argv, "--max-running-requests") == "7"


def test_the_flags_of_the_user_come_last() -> None:
    given = ("--max-total-tokens", "5", "--tp-size", "2")
    assert tuple(args(sglang_args=given)[-4:]) == given


@pytest.mark.parametrize(
    ("wanted", "flags", "got"),
    [
        ("auto", {"avx2"}, "float32"),
        ("auto", {"avx512_bf16"}, "bfloat16"),
        ("float16", {"avx512_bf16"}, "float16"),
    ],
)
def test_precision_on_a_cpu(wanted: str, flags: set[str], got: str) -> None:
    assert cpu_dtype(wanted, flags) == got


def environment(device: Device, **inherited: str) -> dict[str, str]:
    return server_environment(inherited, device=device, temporary="/t", parent_pid=42)


def test_the_cpu_engine_is_asked_for_on_a_cpu_only() -> None:
    assert environment("cpu")["SGLANG_USE_CPU_ENGINE"] == "1"
    assert "SGLANG_USE_CPU_ENGINE" not in environment("cuda", SGLANG_USE_CPU_ENGINE="1")
    for name in ("TORCHDYNAMO_DISABLE", "OMP_WAIT_POLICY"):
        assert name in environment("cpu")
        assert name not in environment("cuda")


def test_what_the_user_has_set_survives() -> None:
    got = environment("cpu", HF_HUB_OFFLINE="1", PYTHONPATH="/mine", TORCHDYNAMO_DISABLE="0")
    assert got["HF_HUB_OFFLINE"] == "1"
    assert got["TORCHDYNAMO_DISABLE"] == "0"
    root, mine = got["PYTHONPATH"].split(":")
    assert (Path(root) / "workers" / "sglang" / "server" / "launch.py").exists()
    assert mine == "/mine"


def test_the_server_talks_to_itself_past_a_proxy() -> None:
    got = environment("cpu", NO_PROXY="corp", http_proxy="http://proxy:1")
    assert got["NO_PROXY"] == got["no_proxy"] == "corp,127.0.0.1,localhost"


def test_what_follows_the_dashes_is_the_servers() -> None:
    assert split(["--port", "1", "--", "--tp-size", "2"]) == (["--port", "1"], ("--tp-size", "2"))
    assert split(["--port", "1"]) == (["--port", "1"], ())
    assert split(["--", "--x", "--", "y"]) == ([], ("--x", "--", "y"))


def test_the_endpoint_is_an_address() -> None:
    assert SglangSettings(sgl_endpoint="http://h:1/").sgl_endpoint == "http://h:1"
    with pytest.raises(ValueError, match="not an address"):
        SglangSettings(sgl_endpoint="h:1")
