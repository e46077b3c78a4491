"""What quantized weights save and what they cost: memory, and marks in an exam."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
from rich.table import Table

from bench.client import Client
from bench.hf.speed import bodies
from bench.processes import ROOT, Harness, ProcessFailed, Running, tail
from bench.results import Keep, record
from protocol.messages import WorkerStatus

EXAM = "models/pocket-llava/eval.py"
FLAGS = {"base": (), "8bit": ("--load-8bit",), "4bit": ("--load-4bit",)}
_REGISTERED_S = 60.0
REQUESTS = 20  # before memory is read again; every second one with a picture
_WEIGHTS = re.compile(r"weights ([\d.]+) MiB -> ([\d.]+) MiB")


def weights_mib(events: Sequence[str]) -> tuple[float, float] | None:
    """MiB of weights before and after quantization, from what a worker logged."""
    found = next((match for event in events if (match := _WEIGHTS.search(event))), None)
    return None if found is None else (float(found[1]), float(found[2]))


def totals(marks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of right answers over all sections: letter for letter, and in any words."""
    asked = sum(mark["n"] for mark in marks)
    return {
        "n": asked,
        "exact": sum(mark["exact_answers"] for mark in marks) / asked,
        "fact": sum(mark["right_facts"] for mark in marks) / asked,
    }


def run(
    harness: Harness,
    keep: Keep,
    *,
    precisions: Sequence[str],
    exam: bool,
    questions: int,
    only: Sequence[str],
) -> None:
    """Measure each of ``precisions``, print, and keep the line of results.

    Args:
        exam: whether the model is the embedded one, whose answers can be judged.
        questions: of each section of the exam; ``only`` the sections whose name holds one of these.

    Raises:
        ProcessFailed: a process did not start, or the exam could not be held.
    """
    found: dict[str, dict[str, Any]] = {}
    status: WorkerStatus | None = None
    interrupted = False
    try:
        with harness.process("controller") as controller:
            for name in precisions:
                gpu_before = _gpu_used_mib()
                with harness.worker(*FLAGS[name], controller=controller.address) as worker:
                    status = worker.status()
                    figures = found[name] = _memory(worker, status, gpu_before)
                    if exam:
                        _wait_registered(controller)
                        marks = _judge(harness, controller.address, questions, only)
                        figures["exam"] = {"total": totals(marks), "marks": marks}
    except KeyboardInterrupt:
        interrupted = True
    if status is not None and found:
        _report(harness, keep, status, found, interrupted=interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _report(
    harness: Harness,
    keep: Keep,
    status: WorkerStatus,
    found: dict[str, dict[str, Any]],
    *,
    interrupted: bool,
) -> None:
    before = next(
        (f["weights_mib_before"] for f in found.values() if f["weights_mib_before"]), None
    )
    if "base" in found:  # a worker that quantizes nothing does not log what its weights take
        found["base"]["weights_mib"] = before
    harness.console.print(memory_table(found))
    if judged := {name: figures for name, figures in found.items() if "exam" in figures}:
        harness.console.print(exam_table(judged))
    keep(record("hf_precision", status, {"interrupted": interrupted, "precisions": found}))


def _memory(worker: Running, status: WorkerStatus, gpu_before: int | None) -> dict[str, Any]:
    """Memory after the start and after some requests; how many of these failed."""
    started = worker.memory_bytes()
    asked = bodies(status.model_names[0], REQUESTS, tokens=32, pictures=status.capabilities.images)
    with Client() as client:
        ends = [client.one(worker.address, body).end for body in asked]
    gpu_after = _gpu_used_mib()
    weights = weights_mib(worker.events())
    return {
        "precision": status.precision,
        "weights_mib_before": weights[0] if weights else None,
        "weights_mib": weights[1] if weights else None,
        "started_bytes": started,
        "after_requests_bytes": worker.memory_bytes(),
        "gpu_mib": None if gpu_before is None or gpu_after is None else gpu_after - gpu_before,
        "requests": len(ends),
        "failed": sum(end not in ("stop", "length") for end in ends),
    }


def _wait_registered(controller: Running) -> None:
    """Until the controller knows one ready worker; that of before has left by then.

    Raises:
        ProcessFailed: it does not within ``_REGISTERED_S``.
    """
    deadline = time.monotonic() + _REGISTERED_S
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            cluster = httpx.get(f"{controller.address}/cluster", timeout=10, trust_env=False).json()
            if [worker["state"] for worker in cluster["workers"]].count("ready") == 1:
                return
        time.sleep(0.1)
    raise ProcessFailed(f"The controller has no single ready worker.\n{tail(controller.log)}")


def _gpu_used_mib() -> int | None:
    """Memory in use on all GPUs, whoever uses it; ``None`` without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    asked = subprocess.run(command, capture_output=True, text=True)
    return sum(map(int, asked.stdout.split())) if asked.returncode == 0 else None


def _judge(
    harness: Harness, controller: str, questions: int, only: Sequence[str]
) -> list[dict[str, Any]]:
    """The marks of the exam, held by a process of its own that shows how far it is.

    Raises:
        ProcessFailed: it ended without marks.
    """
    file = harness.folder / "marks.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, EXAM, "--url", controller, "--json", str(file), "-n", str(questions)]
    if only:
        command += ["--only", *only]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    if ended.returncode or not file.exists():
        raise ProcessFailed(f"`{EXAM}` ended with {ended.returncode}; it says above why.")
    marks: list[dict[str, Any]] = json.loads(file.read_text())["marks"]
    return marks


def memory_table(found: dict[str, dict[str, Any]]) -> Table:
    """Weights and resident memory for people, in MiB."""
    drawn = Table(title="MiB of weights, and of the process", title_justify="left")
    drawn.caption = f"memory at the start, after {REQUESTS} requests"
    drawn.add_column("weights")
    for column in ("stored as", "weights", "anonymous", "USS", "RSS", "GPU", "failed"):
        drawn.add_column(column, justify="right")
    for name, figures in found.items():
        memory = [figures[when] for when in ("started_bytes", "after_requests_bytes")]
        drawn.add_row(
            *(name, figures["precision"], _shown(figures["weights_mib"])),
            *(
                ", ".join(f"{at[which] / 2**20:.0f}" for at in memory)
                for which in ("anon", "uss", "rss")
            ),
            *(_shown(figures["gpu_mib"]), str(figures["failed"])),
        )
    return drawn


def exam_table(found: dict[str, dict[str, Any]]) -> Table:
    """Shares of exact answers (and of right facts) by section, with those of the base kept."""
    drawn = Table(title="exam: exact (fact)", title_justify="left")
    drawn.add_column("what is asked")
    drawn.add_column("n", justify="right")
    for name in found:
        drawn.add_column(name, justify="right")
    sections = [figures["exam"]["marks"] for figures in found.values()]
    for row in zip(*sections, strict=True):
        shares = (
            f"{m['exact_answers'] / m['n']:.3f} ({m['right_facts'] / m['n']:.3f})" for m in row
        )
        drawn.add_row(row[0]["section"], str(row[0]["n"]), *shares)
    drawn.add_section()
    total = [figures["exam"]["total"] for figures in found.values()]
    drawn.add_row(
        "all", str(total[0]["n"]), *(f"{one['exact']:.3f} ({one['fact']:.3f})" for one in total)
    )
    if "base" in found:
        base = found["base"]["exam"]["total"]["exact"]
        kept = (f"{one['exact'] / base:.3f}" if base else "" for one in total)
        drawn.add_row("of the base's exact", "", *kept)
    return drawn


def _shown(mib: float | None) -> str:
    return "" if mib is None else f"{mib:.1f}"
