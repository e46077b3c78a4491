"""Soak test: many concurrent streams through a controller and echo workers, every reply verified.

    python -m bench.soak --streams 1000 --requests 100000 --out bench/results/soak.json

It starts its own controller and echo workers as real processes on free ports, keeps ``--streams``
connections busy from ``--clients`` processes until ``--requests`` requests have been made, and
checks each reply byte for byte against what an echo must be, in all three dialects (our SSE,
OpenAI's and LLaVA's). ``--leave`` of the clients go away at a random moment; ``--bad`` of the
requests are wrong and must be refused in the right way. The client shares no code with what it
tests.

    ok          the whole echo, in order, one terminal event, nothing after it
    left        the client went away on purpose
    bad_ok      a wrong request, refused with the right status and a typed error
    refused     a good request refused (429 or 503)
    lost        no reply                      cut         a reply without its terminal event
    failed      a typed failure in the stream duplicated  a second terminal event, or more after it
    wrong       any other difference          timeout     nothing complete within --timeout-s

At the end nothing may be in flight or waiting anywhere; memory (RSS) is sampled all the time.
Prints a table, then one JSON line last. Ctrl-C keeps what was measured. Exit code: 0 when every
reply was as it must be and all slots came back, else 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.soak.exchanges import OUTCOMES
from bench.soak.run import as_it_must_be, soak


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    replies = Table(title=f"{report['requests']} requests, {report['requests_per_s']} a second")
    for name in OUTCOMES:
        replies.add_column(name, justify="right")
    replies.add_row(*(str(report["outcomes"][name]) for name in OUTCOMES))
    console.print(replies)
    memory = Table(title="RSS in MB after a share of the requests")
    for name in ("process", "10 %", "50 %", "100 %", "MB per 100k requests", "CPU ms/request"):
        memory.add_column(name, justify="left" if name == "process" else "right")
    for name, figures in report["memory"].items():
        cpu = report["cpu_ms_per_request"][name]
        memory.add_row(name, *(str(figure) for figure in figures.values()), str(cpu))
    console.print(memory)
    ttft, total = report["ttft_s"], report["duration_s"]
    console.print(
        f"first byte p50 {ttft['p50']} s, p99 {ttft['p99']} s; "
        f"whole answer p50 {total['p50']} s, p99 {total['p99']} s"
    )
    console.print("left behind: " + ", ".join(f"{k} {n}" for k, n in report["left_behind"].items()))
    for example in report["examples"]:
        console.print(example, style="red", markup=False)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--streams", type=int, default=1000, help="concurrent streams (1000)")
    add("--requests", type=int, default=100_000, help="requests in all (100000)")
    add("--workers", type=int, default=2, help="echo workers (2)")
    add("--worker-capacity", type=int, default=512, help="streams a worker runs at once (512)")
    add("--clients", type=int, default=2, help="client processes (2)")
    add("--leave", type=float, default=0.05, help="share of clients that leave early (0.05)")
    add("--bad", type=float, default=0.02, help="share of wrong requests (0.02)")
    add("--min-tokens", type=int, default=16, help="shortest answer (16)")
    add("--max-tokens", type=int, default=40, help="longest answer (40)")
    add("--token-delay-s", type=float, default=0.01, help="the workers' pause per token (0.01)")
    add("--timeout-s", type=float, default=120.0, help="longest wait for a whole reply (120)")
    add("--seed", type=int, default=0, help="of the random choices (0)")
    add("--out", type=Path, help="write the JSON report to this file")
    args = parser.parse_args(argv)
    for name in ("streams", "requests", "workers", "worker_capacity", "clients"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 2 <= args.min_tokens <= args.max_tokens:
        parser.error("--min-tokens must be at least 2 and at most --max-tokens")
    args.clients = min(args.clients, args.streams)
    return args


def main() -> int:
    args = parse()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 2 * args.streams + 200:
        sys.stderr.write(f"error: {hard} open files are too few for {args.streams} streams.\n")
        return 2
    report = soak(args)
    if args.out is not None:
        report["settings"]["out"] = None
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report, Console(width=120))
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}))
    return 0 if as_it_must_be(report) else 1


if __name__ == "__main__":
    raise SystemExit(main())
