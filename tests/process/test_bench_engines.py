"""`python -m bench` on its own cluster of real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT

TIMEOUT_S = 300
pytestmark = pytest.mark.timeout(TIMEOUT_S + 20)


def bench(out: Path, *args: object) -> tuple[str, dict[str, Any]]:
    """What it printed, and its file of results."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, args), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.with_suffix(".json").read_text())


def test_both_backends_give_the_same_and_right_answers(tmp_path: Path) -> None:
    stdout, found = bench(
        tmp_path / "found",
        *("compare", "--kinds", "hf-unbatched", "sglang", "--workloads", "chat", "--levels", 4),
        *("--questions", 20, "--rounds", 1, "--requests", 8, "--rates"),
    )
    assert "chat, closed loop" in stdout
    parity = found["parity"]["targets"]
    assert parity["sglang"]["equal"] == 1.0
    for told in parity.values():
        assert told["answered"] == 20
        assert told["right"] >= 0.9
    cells = {cell["target"]: cell["summary"] for cell in found["cells"]}
    assert set(cells) == {"hf-unbatched", "sglang"}
    for summary in cells.values():
        assert summary["refused"] == summary["failed"] == {}
        assert summary["answered"] == summary["requests"]
        assert summary["output_tokens_per_s"]["median"] > 0
    assert cells["sglang"]["cached_share"]["median"] > 0.2
    assert cells["hf-unbatched"]["cached_share"]["median"] == 0
    assert {"scheduler", "detokenizer"} <= set(cells["sglang"]["rss_bytes"])
    assert "<h1>hf-unbatched against sglang</h1>" in (tmp_path / "found.html").read_text()


def test_cross_check_against_sglangs_own_benchmark(tmp_path: Path) -> None:
    stdout, found = bench(
        tmp_path / "found",
        *("cross-check", "--requests", 6, "--users", 2, "--tokens", 8, "--rounds", 1),
    )
    assert "sglang.benchmark.serving" in stdout
    for side in ("ours", "theirs"):
        (one,) = found["rounds"][side]
        assert one["answered"] == 6
        assert one["output_tokens"] == 6 * 8
        assert 0 < one["ttft_s"] <= one["duration_s"]
    assert set(found["difference"]) >= {"output_tokens_per_s", "ttft_s"}
