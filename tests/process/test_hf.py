"""`python -m workers.hf`: the flags that LLaVA's users know, on the embedded model."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from protocol.messages import WorkerStatus
from tests.pictures import encoded, picture
from tests.processes import ROOT, running
from tests.streams import ask, user
from transport.exits import EXIT_START_FAILED, EXIT_USAGE

pytestmark = pytest.mark.timeout(180)

COLORS = ("red", "blue", "green", "yellow", "black", "orange")


@pytest.mark.parametrize(("flag", "precision"), [("--load-4bit", "nf4"), ("--load-8bit", "int8")])
def test_quantized_weights_with_nothing_else(tmp_path: Path, flag: str, precision: str) -> None:
    with running(tmp_path, "workers.hf", flag, "--port", "0", "--no-register") as worker:
        address = worker.wait_ready(timeout_s=90)
        status = WorkerStatus.model_validate_json(
            httpx.post(f"{address}/worker_get_status").content
        )
        assert status.precision == precision
        assert status.weight_bytes is not None
        assert status.unquantized_bytes is not None
        assert status.weight_bytes < 0.8 * status.unquantized_bytes
        said = [entry["event"] for entry in worker.entries()]
        assert any(line.startswith("weights ") and " MiB -> " in line for line in said), said

        def color_of(color: str) -> str:
            return ask(
                address,
                model="pocket-llava",
                temperature=0,
                messages=user("<image>What color is the square?"),
                images=[encoded(picture("square", color))],
                max_new_tokens=16,
            ).text

        with ThreadPoolExecutor(len(COLORS)) as pool:
            answers = list(pool.map(color_of, COLORS))
        right = sum(color in answer for color, answer in zip(COLORS, answers, strict=True))
        assert right >= len(COLORS) - 1, answers


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--load-4bit", "--load-8bit"), EXIT_USAGE, "exclude each other"),
        (("--adapter", "formal"), EXIT_USAGE, "name=path"),
        (("--use-flash-attn", "--device", "cpu"), EXIT_START_FAILED, "needs an NVIDIA GPU"),
        (("--adapter", "x=/nowhere/at/all"), EXIT_START_FAILED, "/nowhere/at/all"),
        (("--model-path", str(ROOT / "models/adapters/formal")), EXIT_START_FAILED, "--model-base"),
        (("--conv-template", "vicuna_v9"), EXIT_START_FAILED, "vicuna_v1"),
    ],
    ids=str,
)
def test_a_mistake_is_a_sentence(flags: tuple[str, ...], code: int, words: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "workers.hf", "--port", "0", "--no-register", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert found.returncode == code, found.stderr
    assert words in found.stderr
    assert "Traceback" not in found.stdout + found.stderr
