"""The server's command line and environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.sglang.__main__ import split
from workers.sglang.command import Device, cpu_dtype, server_args, server_environment
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
    assert value(argv, "--attention-backend") == "torch_native"
    assert value(argv, "--max-total-tokens") == "999"
    assert value(argv, "--max-running-requests") == "32"
    assert "--sleep-on-idle" in argv


def test_a_gpu_keeps_the_defaults_of_sglang() -> None:
    argv = args("cuda")
    for flag in ("--device", "--attention-backend", "--max-total-tokens", "--max-running-requests"):
        assert flag not in argv


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
    assert "SGLANG_USE_CPU_ENGINE" not in environment("cuda")
    assert "TORCHDYNAMO_DISABLE" not in environment("cuda")


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
