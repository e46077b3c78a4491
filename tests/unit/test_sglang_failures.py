"""What is wrong inside SGLang's processes is told in words, and in none that a client sent.

pytest tests/unit/test_sglang_failures.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from protocol.errors import EngineFailed
from tests.processes import ROOT
from workers.sglang.request import from_wire_text

pytest.importorskip("sglang")
pytestmark = pytest.mark.timeout(120)

PREPARE = """
import runpy
from types import SimpleNamespace
runpy.run_module("workers.sglang.server.launch", run_name="__mp_main__")
"""

GRAMMAR = """
from workers.sglang.server.grammar import Backend
backend = Backend.__new__(Backend)
def started(never):
    raise KeyError("SECRET")
backend._started = started
for text in ("{}", '{"json_schema": 1, "regex": "SECRET"}'):
    print("said:", backend._make(text).error_message)
"""

WEIGHTS = """
import torch
from workers.sglang.server.models.llava_hf import LlavaForConditionalGeneration
model = SimpleNamespace(named_parameters=lambda: [], language_model=None)
try:
    LlavaForConditionalGeneration.load_weights(model, [("vision_tower.extra", torch.zeros(1))])
except ValueError as error:
    print("said:", error)
"""


def run(code: str) -> tuple[list[str], str]:
    """What ``code`` says in a process of SGLang's, and all it writes."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PREPARE + code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [
        line.removeprefix("said: ") for line in done.stdout.splitlines() if line.startswith("said:")
    ]
    return said, done.stdout + done.stderr


def test_a_grammar_that_cannot_be_made_fails_its_request_only() -> None:
    said, written = run(GRAMMAR)
    errors = [from_wire_text(text) for text in said]
    for error, kind in zip(errors, ("KeyError", "ValidationError"), strict=True):
        assert isinstance(error, EngineFailed)
        assert kind in error.message
    assert "SECRET" not in written
    assert "error while making a grammar: KeyError at" in written


def test_a_weight_without_a_place_is_named() -> None:
    said, _ = run(WEIGHTS)
    assert said == ["The checkpoint has a weight that the model lacks: vision_tower.extra"]
