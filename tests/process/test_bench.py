"""`python -m bench` as a person meets it: over echo workers in seconds, and over real engines."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import ROOT, running, until, wait_workers

pytestmark = pytest.mark.timeout(120)
ENGINES_S = 300

SMALL = (
    *("--questions", "4", "--rounds", "2", "--requests", "4", "--waves", "1"),
    *("--max-new-tokens", "5", "--open-s", "0.3"),
)


def bench(*args: object, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@contextmanager
def echo(folder: Path, *flags: str) -> Iterator[str]:
    """An echo worker by itself, and its address."""
    flags = ("--port", "0", *flags)
    with running(folder, "workers.echo", *flags) as process:
        yield process.wait_ready()


def results(prefix: Path) -> dict[str, Any]:
    found = json.loads(prefix.with_suffix(".json").read_text())
    assert found["schema"] == "tandem.bench/1"
    return dict(found)


def test_compare_of_a_controller_and_a_worker(tmp_path: Path) -> None:
    with ExitStack() as stack:
        controller = stack.enter_context(
            running(tmp_path, "controller", "--port", "0")
        ).wait_ready()
        workers = [
            stack.enter_context(
                echo(tmp_path, "--model-name", name, "--controller-address", controller)
            )
            for name in ("one", "two")
        ]
        wait_workers(controller, 2)
        targets = (
            f"one={controller}#one",
            f"two={controller}?api=openai#two",
            f"direct={workers[0]}",
        )
        out, trace = tmp_path / "found", tmp_path / "trace.jsonl"
        lines = [
            {"at_s": 0.1 * at, "prompt": f"Say {at}.", "images": ["draw:1"]} for at in range(5)
        ]
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = bench(
            *("compare", "--targets", *targets, "--workloads", "vqa", "random", "--levels", 1, 3),
            *(*SMALL, "--rates", 20, "--trace", trace, "--out", out),
        )
    assert done.returncode == 0, done.stderr
    # The truth comes first; then every workload has its table.
    assert 0 <= done.stdout.index("questions") < done.stdout.index("vqa, closed loop")
    assert "random, closed loop" in done.stdout
    assert "vqa, open loop" in done.stdout
    assert "trace, replayed" in done.stdout
    found = results(out)
    assert {name: told["equal"] for name, told in found["parity"]["targets"].items()} == {
        "one": 1.0,
        "two": 1.0,
        "direct": 1.0,
    }
    keys = {(c["workload"], c["mode"], c["level"], c["target"]) for c in found["cells"]}
    assert len(keys) == len(found["cells"]) == (2 * 2 + 1 + 1) * 3
    for cell in found["cells"]:
        assert sorted(cell["rounds"]) == ["0", "1"]
        assert cell["summary"]["refused"] == cell["summary"]["failed"] == {}
        least = 2 * 5 if cell["mode"] == "trace" else 8
        assert cell["summary"]["answered"] == cell["summary"]["requests"] >= least
        assert cell["summary"]["ttft_s"]["p95"]["median"] > 0
        assert cell["summary"]["rss_bytes"]["worker"]["median"] > 1e6
        assert ("controller" in cell["summary"]["cpu_s"]) == (cell["target"] != "direct")
    assert found["commit"]
    assert found["plan"]["seed"] == 0
    assert found["machine"]["versions"]["aiohttp"]
    assert "workers.echo" in found["targets"]["direct"]["commands"]["worker"][0]
    page = out.with_suffix(".html").read_text()
    assert page.count("<svg") >= 5
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import""", page)

    drawn = bench("plot", out.with_suffix(".json"), "--out", tmp_path / "pictures")
    assert drawn.returncode == 0, drawn.stderr
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"found-overview.svg", "found-throughput.svg", "found-open.svg"} <= names
    assert {"found-latency.svg", "found-timelines.svg", "found-trace.svg", "found.html"} <= names


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    with echo(tmp_path, "--no-register", "--delay-s", "0.02") as worker:
        out = tmp_path / "found"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench", "compare", "--targets", f"a={worker}"),
                *("--workloads", "random", "--levels", "2", *SMALL, "--rounds", "1000"),
                *("--out", str(out)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:

            def rounds_are_done() -> bool:
                said = httpx.get(f"{worker}/metrics").text
                counted = [line for line in said.splitlines() if "requests_total{" in line]
                return sum(float(line.split()[-1]) for line in counted) > 4 + 4 + 3 * 4

            until(rounds_are_done, timeout_s=60, what="three rounds")
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "stopped before its end" in stdout
    found = results(out)
    assert found["interrupted"]
    assert 1 <= len(found["cells"][0]["rounds"]) < 1000
    assert out.with_suffix(".html").exists()


def test_a_target_that_dies_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    dying = ("--no-register", "--die-after", "300")
    with echo(tmp_path, "--no-register") as alive, echo(tmp_path, *dying) as dies:
        out = tmp_path / "found"
        done = bench(
            *("compare", "--targets", f"a={alive}", f"b={dies}", "--workloads", "random"),
            *("--levels", 2, *SMALL, "--rounds", 20, "--rates", "--out", out),
        )
    assert done.returncode == 1, done.stderr
    assert "b is dead" in done.stdout
    found = results(out)
    assert "it does not answer" in found["targets"]["b"]["dead"]
    rounds = {cell["target"]: len(cell["rounds"]) for cell in found["cells"]}
    assert rounds["a"] == 20
    assert 1 <= rounds["b"] < 20
    failed = next(c["summary"]["failed"] for c in found["cells"] if c["target"] == "b")
    assert sum(failed.values()) > 0


def test_refusals_are_counted_as_such(tmp_path: Path) -> None:
    flags = ("--limit-model-concurrency", "1", "--max-waiting", "0", "--delay-s", "0.02")
    with echo(tmp_path, "--no-register", *flags) as worker:
        out = tmp_path / "found"
        done = bench(
            *("compare", "--targets", f"a={worker}", "--workloads", "random", "--levels", 3),
            *(*SMALL, "--rates", "--out", out),
        )
    assert done.returncode == 0, done.stderr
    (cell,) = results(out)["cells"]
    refused = cell["summary"]["refused"]["429 overloaded"]
    assert refused > 0
    assert cell["summary"]["answered"] + refused == cell["summary"]["requests"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("compare", "--targets", "nothing"), "NAME=http://"),
        (("compare", "--targets", "a=http://127.0.0.1:9"), "nothing listens"),
        (("compare", "--rounds", "0"), "must be positive"),
        (("compare", "--trace", "no-such-file"), "cannot be read"),
        (("plot", "pyproject.toml"), "cannot be read"),
        (("overhead", "--levels", "0"), "at least 1"),
        (("no-such-command",), "invalid choice"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(args: tuple[str, ...], says: str) -> None:
    done = bench(*args)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_overhead_of_a_few_streams(tmp_path: Path) -> None:
    out = tmp_path / "overhead"
    done = bench(
        *("overhead", "--levels", 1, 4, "--rounds", 1, "--tokens", 4, "--workers", 1),
        *("--out", out),
    )
    assert done.returncode == 0, done.stderr
    assert "what the controller adds" in done.stdout
    found = results(out)
    assert [level["streams"] for level in found["levels"]] == [1, 4]
    for level in found["levels"]:
        cpu_us = level["paced"]["controller"]["controller_cpu_us_per_token"]["median"]
        assert 0 < cpu_us < 100_000
        assert level["flat_out"]["direct"]["answered"] == 256
    assert out.with_suffix(".svg").read_text().startswith("<?xml")


# ---------------------------------------------------------------- real engines


@pytest.mark.timeout(ENGINES_S + 20)
def test_both_backends_give_the_same_and_right_answers(tmp_path: Path) -> None:
    out = tmp_path / "found"
    done = bench(
        *("compare", "--kinds", "hf-unbatched", "sglang", "--workloads", "chat", "--levels", 4),
        *("--questions", 20, "--rounds", 1, "--requests", 8, "--rates"),
        *("--out", out),
        timeout_s=ENGINES_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)
    assert "chat, closed loop" in done.stdout
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
    assert "<h1>hf-unbatched against sglang</h1>" in out.with_suffix(".html").read_text()


@pytest.mark.timeout(ENGINES_S + 20)
def test_cross_check_against_sglangs_own_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "found"
    done = bench(
        *("cross-check", "--requests", 6, "--users", 2, "--tokens", 8, "--rounds", 1),
        *("--out", out),
        timeout_s=ENGINES_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)
    assert "sglang.benchmark.serving" in done.stdout
    for side in ("ours", "theirs"):
        (one,) = found["rounds"][side]
        assert one["answered"] == 6
        assert one["output_tokens"] == 6 * 8
        assert 0 < one["ttft_s"] <= one["duration_s"]
    assert set(found["difference"]) >= {"output_tokens_per_s", "ttft_s"}
