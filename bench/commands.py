"""The commands of ``python -m bench``: their flags, and what they do with them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import cross_check as cross_checks
from bench import files, machine, own_cluster, plots, report, tables, workloads
from bench import overhead as overheads
from bench.compare import Comparison, Plan
from bench.figures import Limits
from bench.processes import ROOT, Harness, ProcessFailed
from bench.results import commit
from bench.session import worker_flags
from bench.sglang.speed import server_of
from bench.targets import Target, TargetError, find, parse
from bench.workloads import WORKLOADS, WorkloadError

OUT = ROOT / "bench" / "out"
WIDTH = 150  # where no terminal says its own

# ---------------------------------------------------------------- compare


def compare_flags(parser: argparse.ArgumentParser) -> None:
    default = Plan()
    kinds = list(own_cluster.KINDS)
    add = parser.add_argument
    add("--targets", nargs="+", default=[], metavar="NAME=URL", help="running ones to compare")
    add("--api-key", help="of the targets (none)")
    add("--out", type=Path, default=OUT / "compare", help="PREFIX of .json and .html")
    own = parser.add_argument_group("a cluster of its own, without --targets").add_argument
    own("--kinds", nargs="+", choices=kinds, default=kinds, help="which (all), first is 1 times")
    own("--model-path", help="checkpoint (the embedded model)")
    own("--device", default="cpu", choices=["cpu", "cuda", "auto"], help="of the workers (cpu)")
    own("--dtype", help="of the weights (float32 on a CPU, else auto)")
    own(
        "--worker-flags",
        nargs="+",
        default=[],
        metavar="KIND=FLAGS",
        help="more flags for one kind: 'hf-unbatched=--limit-model-concurrency 8', "
        "'sglang=-- --mem-fraction-static 0.5'",
    )
    load = parser.add_argument_group("load").add_argument
    load(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        default=list(default.workloads),
        help=f"({' '.join(default.workloads)})",
    )
    load("--trace", type=Path, help="JSONL of arrivals, prompts and images; replayed as well")
    load(
        "--levels",
        type=int,
        nargs="*",
        default=list(default.levels),
        help=f"users of the closed loop ({' '.join(map(str, default.levels))})",
    )
    load(
        "--rates",
        nargs="*",
        default=["auto"],
        help="requests/s of the open loop, with the first workload; auto: around the knee of each "
        "target; nothing: no open loop (auto)",
    )
    load("--open-s", type=float, default=default.open_s, help="seconds of each (%(default)g)")
    load("--rounds", type=int, default=default.rounds, help="(%(default)s)")
    load("--requests", type=int, default=default.requests, help="at least, a run (%(default)s)")
    load("--waves", type=int, default=default.waves, help="at least, a user (%(default)s)")
    load("--max-new-tokens", type=int, help="of every answer, in place of the workload's own")
    load("--questions", type=int, default=default.questions, help="of the truth (%(default)s)")
    load("--seed", type=int, default=default.seed, help="(%(default)s)")
    load("--ttft-limit-s", type=float, default=default.limits.ttft_s, help="goodput (%(default)g)")
    load("--itl-limit-s", type=float, default=default.limits.itl_s, help="goodput (%(default)g)")


def compare(args: argparse.Namespace) -> int:
    """Compare targets: the same questions, the same loads, in turn.

    Without --targets it starts a controller with a Hugging Face worker as LLaVA's (a thread a
    request), one that batches, and an SGLang worker. First every target answers the same fixed
    questions: how many answers are equal, and how many right. Then each load, round by round, with
    every target in turn, caches emptied in between. Prints tables and writes PREFIX.json and
    PREFIX.html. Ctrl-C keeps what was measured.

    A target is NAME=URL, with ?api=tandem, sglang or openai (found out when not said), ?kind=hf to
    choose a controller's workers, and #MODEL where there are several:

        --targets old=http://127.0.0.1:21001?kind=hf#llava new=http://127.0.0.1:30000

    Exit code: 0; 1 if a target died or nothing was measured; 2 for a mistake, or if a process did
    not start; 130 after Ctrl-C.
    """
    plan = _plan(args)
    commit()  # what runs from here on, whatever is checked out meanwhile
    console = _console()
    head = machine.head("compare", args.argv)
    try:
        trace = workloads.read_trace(args.trace) if args.trace else ()
        with ExitStack() as stack:
            found = _targets(args, stack)
            comparison = Comparison(plan, found, console, trace)
            comparison.run()
            results = head | comparison.results()
            _keep(args.out, results, console)  # before the workers stop: that may be cut short
    except (TargetError, ProcessFailed, WorkloadError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped before anything was measured\n")
        return 130
    if comparison.interrupted:
        return 130
    return int(bool(comparison.dead) or not results["cells"])


def _plan(args: argparse.Namespace) -> Plan:
    auto = args.rates == ["auto"]
    try:
        rates = None if auto else tuple(float(rate) for rate in args.rates)
    except ValueError:
        args.parser.error("--rates takes numbers, or auto, or nothing")
    least = (args.rounds, args.requests, args.waves, args.questions, *args.levels)
    if min(least) < 1 or min(rates or (1.0,)) <= 0 or args.open_s <= 0:
        args.parser.error("rounds, requests, waves, questions, levels and rates must be positive")
    return Plan(
        workloads=tuple(args.workloads),
        levels=tuple(sorted(set(args.levels))),
        rates=rates,
        rounds=args.rounds,
        requests=args.requests,
        waves=args.waves,
        open_s=args.open_s,
        questions=args.questions,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        limits=Limits(args.ttft_limit_s, args.itl_limit_s),
    )


def _targets(args: argparse.Namespace, stack: ExitStack) -> list[Target]:
    """The running targets, or those of a cluster that ends with ``stack``.

    Raises:
        TargetError, ProcessFailed: one cannot be asked.
    """
    if args.targets:
        written = [parse(text) for text in args.targets]
        names = [one.name for one in written]
        if len(set(names)) < len(names):
            raise TargetError("Two targets have one name.")
        return [find(one, args.api_key) for one in written]
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-"))
    harness = Harness(Path(folder), Console(stderr=True), ())
    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    flags = (*worker_flags(device=args.device, model_path=args.model_path), "--dtype", dtype)
    own = dict(_pair(text) for text in args.worker_flags)
    return stack.enter_context(own_cluster.started(harness, args.kinds, flags, own))


def _pair(text: str) -> tuple[str, str]:
    """``KIND=FLAGS``.

    Raises:
        TargetError: there is no such kind.
    """
    kind, _, flags = text.partition("=")
    if kind not in own_cluster.KINDS:
        raise TargetError(f"--worker-flags {text!r}: there is no kind {kind!r}.")
    return kind, flags


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _keep(prefix: Path, results: dict[str, Any], console: Console) -> None:
    file = _file(prefix, ".json")
    files.write(file, results)
    results = files.read(file)  # the page is drawn from what others can draw it from
    if results["parity"]:
        console.print(tables.parity_table(results))
    for table in tables.cell_tables(results):
        console.print(table)
    if results["cells"]:
        console.print(tables.legend(results), style="dim", markup=False)
    for said in tables.warnings(results):
        console.print(f"note: {said}", style="yellow", markup=False)
    if results["cells"]:
        report.write(_file(prefix, ".html"), results)
        console.print(f"{_file(prefix, '.html')} shows it, {file} holds it")


# ---------------------------------------------------------------- overhead


def overhead_flags(parser: argparse.ArgumentParser) -> None:
    default = overheads.Plan()
    add = parser.add_argument
    levels = " ".join(map(str, default.levels))
    add("--levels", type=int, nargs="+", default=list(default.levels), help=f"streams ({levels})")
    add("--rounds", type=int, default=default.rounds, help="(%(default)s)")
    add("--tokens", type=int, default=default.tokens, help="of an answer (%(default)s)")
    add("--workers", type=int, default=default.workers, help="echo workers (%(default)s)")
    add(
        "--tokens-per-s",
        type=float,
        default=default.tokens_per_s,
        help="of all paced streams together, at most (%(default)g)",
    )
    add("--out", type=Path, default=OUT / "overhead", help="PREFIX of .json and .svg")


def overhead(args: argparse.Namespace) -> int:
    """What the controller adds to a direct connection: TTFT, CPU per token, throughput.

    Starts a controller and echo workers; asks the workers directly and through the controller, in
    turn. Prints a table and writes PREFIX.json and PREFIX.svg. Ctrl-C keeps what was measured.
    Exit code: 0; 1 if a request failed or nothing was measured; 2 if a process did not start; 130.
    """
    if min(args.rounds, args.workers, *args.levels) < 1 or args.tokens < 2:
        args.parser.error("rounds, workers and levels must be at least 1, tokens at least 2")
    plan = overheads.Plan(
        levels=tuple(sorted(set(args.levels))),
        rounds=args.rounds,
        tokens=args.tokens,
        workers=args.workers,
        tokens_per_s=args.tokens_per_s,
    )
    head = machine.head("overhead", args.argv)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        measured = overheads.Overhead(plan, Harness(Path(folder), Console(stderr=True), ()))
        try:
            measured.run()
        except ProcessFailed as exc:
            sys.stderr.write(f"error: {exc}\n")
            return 2
    results = head | measured.results()
    files.write(_file(args.out, ".json"), results)
    console = _console()
    console.print(overheads.table(results))
    for name, figure in plots.pictures(results).items():
        plots.save(figure, _file(args.out, ".svg"))
        console.print(f"{args.out}.svg shows the {name}, {args.out}.json holds it")
    if measured.interrupted:
        return 130
    return int(not results["levels"] or overheads.failures(results) > 0)


# ---------------------------------------------------------------- cross-check


def cross_check_flags(parser: argparse.ArgumentParser) -> None:
    default = cross_checks.Plan()
    add = parser.add_argument
    add("--target", metavar="URL", help="a running SGLang server (one of its own)")
    add("--model-path", help="checkpoint of its own server (the embedded model)")
    add("--device", default="cpu", choices=["cpu", "cuda", "auto"], help="of its own (cpu)")
    add("--requests", type=int, default=default.requests, help="a run (%(default)s)")
    add("--users", type=int, default=default.users, help="at once (%(default)s)")
    add("--tokens", type=int, default=default.tokens, help="of an answer (%(default)s)")
    add("--rounds", type=int, default=default.rounds, help="(%(default)s)")
    add("--seed", type=int, default=default.seed, help="(%(default)s)")
    add("--out", type=Path, default=OUT / "cross-check", help="PREFIX of .json")


def cross_check(args: argparse.Namespace) -> int:
    """Our figures beside those of SGLang's own benchmark, on the same SGLang server.

    Both send the same prompts, in turn. Prints a table and writes PREFIX.json. Exit code: 0; 2 if
    the server or SGLang's benchmark does not work; 130 after Ctrl-C.
    """
    if min(args.requests, args.users, args.rounds) < 1 or args.tokens < 4:
        args.parser.error("requests, users and rounds must be at least 1, tokens at least 4")
    plan = cross_checks.Plan(
        requests=args.requests,
        users=args.users,
        tokens=args.tokens,
        rounds=args.rounds,
        seed=args.seed,
    )
    head = machine.head("cross-check", args.argv)
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-"))
            harness = Harness(Path(folder), Console(stderr=True), ())
            address = args.target
            if address is None:
                flags = worker_flags(device=args.device, model_path=args.model_path)
                worker = stack.enter_context(harness.worker(*flags, kind="sglang"))
                address = server_of(worker)
            written = parse(f"server={address}")
            target = find(replace(written, api="sglang"))
            measured = cross_checks.CrossCheck(plan, target, harness)
            measured.run()
    except (TargetError, ProcessFailed, cross_checks.ToolFailed) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped before anything was measured\n")
        return 130
    results = head | measured.results()
    files.write(_file(args.out, ".json"), results)
    _console().print(cross_checks.table(results))
    return 130 if measured.interrupted else 0


# ---------------------------------------------------------------- plot


def plot_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="JSON of compare or overhead")
    add("--out", type=Path, default=OUT, help="folder of the pictures (bench/out)")
    add("--format", choices=("svg", "png"), default="svg", help="(svg)")


def plot(args: argparse.Namespace) -> int:
    """Draw the pictures of files of results, and the report of each comparison.

    Latency against load, throughput against users, timelines of first tokens, processes; what the
    controller adds. They are readable in black and white. Exit code: 0, or 2 for a file that is no
    result.
    """
    try:
        found = {path: files.read(path) for path in args.files}
    except files.FileError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for path, results in found.items():
        if results["kind"] == "compare" and not results["cells"]:
            sys.stderr.write(f"{path}: nothing was measured\n")
            continue
        for name, figure in plots.pictures(results).items():
            picture = args.out / f"{path.stem}-{name}.{args.format}"
            plots.save(figure, picture)
            print(picture)
        if results["kind"] == "compare":
            page = args.out / f"{path.stem}.html"
            report.write(page, results)
            print(page)
    return 0
