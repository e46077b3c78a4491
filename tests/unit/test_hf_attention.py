"""workers.hf.attention: the best flash-attn a GPU can run, or a sentence that helps.

pytest tests/unit/test_hf_attention.py
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from protocol.errors import EngineFailed  # noqa: E402 - after the skip
from workers.hf.attention import best, choose  # noqa: E402 - needs torch

TWO, THREE, FOUR = (f"flash_attention_{version}" for version in (2, 3, 4))
AMPERE, ADA, HOPPER, BLACKWELL, RTX_50 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


def refusal(device_type: str, capability: Any, installed: set[str], dtype: Any = None) -> str:
    with pytest.raises(EngineFailed) as failure:
        best(device_type, capability, installed, dtype)
    return f"{failure.value.message} {failure.value.remedy}"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_without_the_flag_it_is_pytorchs_own(device: str) -> None:
    assert choose(False, torch.device(device)) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        (AMPERE, {TWO, THREE, FOUR}, TWO),
        (ADA, {TWO}, TWO),
        (HOPPER, {TWO, THREE, FOUR}, THREE),
        (HOPPER, {TWO, FOUR}, FOUR),
        (HOPPER, {TWO}, TWO),
        (BLACKWELL, {TWO, THREE, FOUR}, FOUR),
        (RTX_50, {TWO, THREE}, TWO),
    ],
)
def test_the_best_that_is_installed_and_runs(
    capability: tuple[int, int], installed: set[str], chosen: str
) -> None:
    assert best("cuda", capability, installed, torch.bfloat16) == chosen


def test_a_cpu_has_none() -> None:
    with pytest.raises(
        EngineFailed, match="needs an NVIDIA GPU; this worker runs on cpu"
    ) as failure:
        choose(True, torch.device("cpu"))
    assert "PyTorch's own attention" in failure.value.remedy


def test_a_gpu_before_ampere_has_none() -> None:
    assert "this one has 7.5" in refusal("cuda", (7, 5), {TWO, THREE, FOUR})


def test_before_hopper_four_is_not_enough() -> None:
    assert "pip install --no-build-isolation '.[flash-attn]'" in refusal("cuda", ADA, {THREE, FOUR})


def test_from_hopper_on_a_ready_made_one_is_named() -> None:
    assert "pip install 'flash-attn-4>=" in refusal("cuda", HOPPER, set())


def test_float32_is_refused_before_anything_is_loaded() -> None:
    assert "--dtype float32" in refusal("cuda", HOPPER, {FOUR}, torch.float32)
