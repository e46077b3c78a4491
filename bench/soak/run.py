"""One soak: clients against a cluster, to a report."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.soak.client import Plan, Tally, client_main
from bench.soak.cluster import (
    Sample,
    leftovers,
    memory,
    outcome_counters,
    sample,
    started,
    wait_ready,
)
from bench.soak.exchanges import GOOD, OUTCOMES


def run_clients(
    args: argparse.Namespace, address: str, processes: dict[str, psutil.Process]
) -> tuple[Tally, list[Sample], float, bool]:
    """All client processes to their end, or to Ctrl-C."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pipes: dict[Connection, dict[str, int]] = {}
    clients = []
    for index in range(args.clients):
        plan = Plan(
            address,
            _share(args.streams, args.clients, index),
            _share(args.requests, args.clients, index),
            *(args.leave, args.bad, args.min_tokens, args.max_tokens, args.timeout_s),
            args.seed + index,
        )
        ours, theirs = context.Pipe(duplex=False)
        client = context.Process(target=client_main, args=(plan, theirs, stop), daemon=True)
        client.start()
        theirs.close()
        pipes[ours] = {}
        clients.append(client)
    tally, interrupted, done = Tally(), False, 0
    begun_at = time.monotonic()
    samples = [sample(processes, 0.0, 0)]
    open_pipes = set(pipes)
    with _progress() as progress:
        bar = progress.add_task("soak", total=args.requests, note="")
        while open_pipes:
            try:
                for pipe in wait(list(open_pipes), timeout=1.0):
                    assert isinstance(pipe, Connection)
                    try:
                        news = pipe.recv()
                    except EOFError:
                        open_pipes.discard(pipe)
                        continue
                    if isinstance(news, Tally):
                        tally.outcomes += news.outcomes
                        tally.ttft_s += news.ttft_s
                        tally.duration_s += news.duration_s
                        tally.examples += news.examples
                        pipes[pipe] = dict(news.outcomes)
                    else:
                        pipes[pipe] = news
                done = sum(sum(outcomes.values()) for outcomes in pipes.values())
                faults = done - sum(o.get(name, 0) for o in pipes.values() for name in GOOD)
                progress.update(bar, completed=done, note=f"{faults} faults")
                now_s = time.monotonic() - begun_at
                if done > samples[-1].done and now_s - samples[-1].at_s >= 0.5:
                    samples.append(sample(processes, now_s, done))
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                stop.set()
                progress.update(bar, description="stopping")
    wall_s = time.monotonic() - begun_at
    samples.append(sample(processes, wall_s, done))
    for client in clients:
        client.join(10)
    return tally, samples, wall_s, interrupted


def _share(total: int, parts: int, index: int) -> int:
    return total // parts + (index < total % parts)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)

    def at(share: float) -> float | None:
        return round(ordered[int(share * (len(ordered) - 1))], 4) if ordered else None

    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)}


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Start the cluster, drive it, and report."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        process, controller = stack.enter_context(
            started(folder / "controller.log", "controller", "--port", "0")
        )
        processes, workers = {"controller": process}, []
        for index in range(args.workers):
            process, address = stack.enter_context(
                started(
                    *(folder / f"worker-{index}.log", "workers.echo", "--port", "0"),
                    *("--controller-address", controller, "--delay-s", str(args.token_delay_s)),
                    *("--limit-model-concurrency", str(args.worker_capacity)),
                )
            )
            processes[f"worker-{index}"] = process
            workers.append(address)
        wait_ready(controller, args.workers)
        cpu_before = {name: sum(p.cpu_times()[:2]) for name, p in processes.items()}
        tally, samples, wall_s, interrupted = run_clients(args, controller, processes)
        cpu = {n: sum(p.cpu_times()[:2]) - cpu_before[n] for n, p in processes.items()}
        deadline = time.monotonic() + 10
        while any((left := leftovers(controller, workers)).values()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        drained_fds = {name: process.num_fds() for name, process in processes.items()}
        counters = outcome_counters(controller)
    made = sum(tally.outcomes.values())
    return {
        "kind": "soak",
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
        "python": platform.python_version(),
        "interrupted": interrupted,
        "wall_s": round(wall_s, 1),
        "requests": made,
        "requests_per_s": round(made / wall_s, 1),
        "outcomes": {name: tally.outcomes[name] for name in OUTCOMES},
        "examples": tally.examples[:5],
        "ttft_s": _quantiles(tally.ttft_s),
        "duration_s": _quantiles(tally.duration_s),
        "left_behind": left,
        "controller_outcomes": counters,
        "cpu_ms_per_request": {n: round(s * 1e3 / max(made, 1), 3) for n, s in cpu.items()},
        "memory": {name: memory(samples, name) for name in processes},
        "fds_at_end": drained_fds,
        "samples": [asdict(s) for s in samples[:: max(1, len(samples) // 100)]],
    }


def as_it_must_be(report: dict[str, Any]) -> bool:
    """Whether no reply was amiss and every slot came back."""
    faults = {k: n for k, n in report["outcomes"].items() if k not in (*GOOD, "refused")}
    return not any(faults.values()) and not any(report["left_behind"].values())
