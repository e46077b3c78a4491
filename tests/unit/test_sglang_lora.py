"""workers.sglang.server.cpu.lora: no pinned memory without a driver, and the same tensors.

pytest tests/unit/test_sglang_lora.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from workers.sglang.server.cpu import lora

torch = pytest.importorskip("torch")

PINNING = """
import torch

class TorchNativeLoRABackend:
    skip_inactive_dense_lora = False

def make():
    return (
        torch.tensor([0, 3, 7], dtype=torch.int32, device="cpu", pin_memory=True),
        torch.zeros((2, 2), dtype=torch.float32, pin_memory=True),
        torch.arange(3).pin_memory(),
        torch.full((2,), 5),
    )
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Modules that pin, the first of which is among ``MODULES``; all is as before afterwards."""
    names = ["pinning_like_sglang", "pinning_otherwise"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(PINNING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lora, "MODULES", frozenset(names[:1]))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.pin_memory)
    finders = list(sys.meta_path)
    yield names
    sys.meta_path[:] = finders
    for name in names:
        sys.modules.pop(name, None)


def imported(name: str) -> Any:
    return __import__(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_what_it_makes_is_what_torch_makes(modules: list[str]) -> None:
    lora.install()
    made = imported(modules[0]).make()
    wanted = (
        torch.tensor([0, 3, 7], dtype=torch.int32),
        torch.zeros(2, 2),
        torch.tensor([0, 1, 2]),
        torch.tensor([5, 5]),
    )
    for found, plain in zip(made, wanted, strict=True):
        assert torch.equal(found, plain)
        assert found.dtype == plain.dtype
    assert imported(modules[0]).TorchNativeLoRABackend.skip_inactive_dense_lora
    with pytest.raises(RuntimeError):
        imported(modules[1]).make()  # another module's torch is the real one


def test_with_a_driver_nothing_changes(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.Tensor.pin_memory
    lora.install()
    assert imported(modules[0]).torch is torch
    assert not imported(modules[0]).TorchNativeLoRABackend.skip_inactive_dense_lora
    assert torch.Tensor.pin_memory is before


def test_what_is_not_pinned_is_torchs_own() -> None:
    module = ModuleType("plain")
    lora.adapt(module)
    assert module.torch.nn is torch.nn or torch.cuda.is_available()


def test_sglangs_modules_are_where_they_are_sought() -> None:
    root = Path(pytest.importorskip("sglang").__file__).parent.parent
    for name in lora.MODULES:
        source = root.joinpath(*name.split(".")).with_suffix(".py").read_text()
        assert "pin_memory" in source
