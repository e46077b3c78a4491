"""The Hugging Face worker, measured: what its batch gains, costs and must not change.

    python -m bench.hf --out bench/results/hf.jsonl          all parts, the embedded model
    python -m bench.hf speed --rounds 9 --levels 1 4 8 16
    python -m bench.hf mixes --mixes 2000 --seed 1
    python -m bench.hf precision -n 50
    python -m bench.hf random-7b DIR                         writes a checkpoint, see its --help
    python -m bench.hf speed --device cuda --model-path DIR

It starts its own workers as real processes and speaks to them over HTTP as clients do.

    speed       one worker with a batch, one with a thread a request (--batching off), all else
                equal; in every round each level is measured with both, one right after the other,
                and who goes first takes turns. Ratios are within a round. A round that warms up
                is not counted. Greedy answers of --tokens tokens; then the same with a picture
                in every second request. An answer that ends by itself is counted as short.
    mixes       random mixes of 2 to 8 requests of some sixty (texts, pictures, greedy and seeded
                sampling, stop strings, grammars, adapters, logprobs, refusals), arriving at random
                moments, some leaving. Every answer must be what a worker without a batch says to
                the request alone. In float32; in bfloat16 rounding depends on the size of the
                batch, so differences there are a figure and no failure.
    precision   weights as they are, in 8 and in 4 bits: MiB of weights, resident memory at the
                start and after 20 requests, and, of the embedded model, the marks of its exam.

Prints tables, then one JSON line a result; --out appends these to a file. Ctrl-C keeps what was
measured. Exit code: 1 if a request failed, an answer in float32 differed or a worker kept a
request; 2 if a process did not start or died; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.hf import mixes, precision, random_weights, speed
from bench.hf.processes import Harness, ProcessFailed
from bench.hf.results import Keep, commit

PARTS = ("speed", "mixes", "precision")
ADAPTERS = {name: f"models/adapters/{name}" for name in ("formal", "terse")}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    add("--model-path", help="directory or hub id of the checkpoint (the embedded model)")
    add("--device", default="cpu", help="of the workers (cpu)")
    add("--dtype", default="auto", help="of the weights, for speed and precision (auto)")
    add("--out", type=Path, help="append the JSON lines to this file")
    add("--seed", type=int, default=0, help="of the random choices (0)")
    speeds = parser.add_argument_group("speed").add_argument
    speeds(
        "--levels", type=int, nargs="+", default=[1, 4, 8, 16], help="requests at once (1 4 8 16)"
    )
    speeds("--rounds", type=int, default=5, help="counted rounds (5)")
    speeds("--requests", type=int, default=16, help="requests a measurement, at least (16)")
    speeds("--tokens", type=int, default=100, help="length of an answer (100)")
    mixed = parser.add_argument_group("mixes").add_argument
    mixed("--mixes", type=int, default=500, help="mixes in float32 (500)")
    mixed("--bf16-mixes", type=int, default=100, help="mixes in bfloat16 (100)")
    exact = parser.add_argument_group("precision").add_argument
    names = list(precision.FLAGS)
    exact("--precisions", nargs="+", choices=names, default=names, help="which of them (all)")
    exact("-n", type=int, default=100, help="questions of each section of the exam (100)")
    exact("--only", nargs="+", default=[], help="only sections whose name holds one of these")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    for name in ("rounds", "requests", "n"):
        if getattr(args, name) < 1:
            parser.error(f"{'-' if name == 'n' else '--'}{name} must be at least 1")
    if args.tokens < 2:
        parser.error("--tokens must be at least 2: speed is measured from the first to the last")
    if min(args.levels) < 1:
        parser.error("--levels must be at least 1")
    args.parts = args.parts or list(PARTS)
    args.levels = sorted(set(args.levels))
    return args


def write_checkpoint(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hf random-7b",
        description="Write a LLaVA-1.5 with random weights in bfloat16: 7 billion, or fewer.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=32, help="of the language model (32)")
    parser.add_argument("--hidden", type=int, default=4096, help="its width (4096)")
    args = parser.parse_args(argv)
    try:
        weights = random_weights.write(args.folder, layers=args.layers, hidden=args.hidden)
    except (ValueError, OSError) as exc:
        parser.error(str(exc))
    print(f"{args.folder}: {weights / 1e6:.1f} million weights")
    return 0


def measure(args: argparse.Namespace, harness: Harness, part: str, keep: Keep) -> None:
    """Take the figures of one part and keep them."""
    dtype = ("--dtype", args.dtype)
    if part == "speed":
        speed.run(
            harness.with_flags(*dtype),
            keep,
            levels=args.levels,
            rounds=args.rounds,
            requests=args.requests,
            tokens=args.tokens,
        )
    elif part == "mixes":
        mixes.run(
            harness,
            keep,
            dtypes=(("float32", args.mixes), ("bfloat16", args.bf16_mixes)),
            adapters={} if args.model_path else ADAPTERS,
            seed=args.seed,
        )
    else:
        precision.run(
            harness.with_flags(*dtype),
            keep,
            precisions=args.precisions,
            exam=not args.model_path,
            questions=args.n,
            only=args.only,
        )


def main() -> int:
    argv = sys.argv[1:]
    if argv[:1] == ["random-7b"]:
        return write_checkpoint(argv[1:])
    args = parse(argv)
    flags = ["--device", args.device]
    if args.model_path:
        path = Path(args.model_path)  # workers run in another folder
        flags += ["--model-path", str(path.resolve()) if path.exists() else args.model_path]
    lines: list[dict[str, Any]] = []

    def keep(line: dict[str, Any]) -> None:
        lines.append(line)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(f"{json.dumps(line)}\n")

    code = 0
    commit()  # what runs from here on, whatever is checked out meanwhile
    with tempfile.TemporaryDirectory(prefix="bench-hf-") as folder:
        harness = Harness(Path(folder), Console(width=130), tuple(flags))
        try:
            for part in args.parts:
                measure(args, harness, part, keep)
        except ProcessFailed as exc:
            sys.stderr.write(f"error: {exc}\n")
            code = 2
        except KeyboardInterrupt:
            sys.stderr.write("stopped; this is what was measured so far\n")
            code = 130
    for line in lines:
        print(json.dumps(line))
    return code or int(not all(map(as_it_must_be, lines)))


def as_it_must_be(line: dict[str, Any]) -> bool:
    """Whether a line of results holds no failure."""
    if line["kind"] == "hf_speed":
        levels = line["levels"].values()
        return not any(
            side[name]["failed"] for side in levels for name in ("on", "off") if name in side
        )
    if line["kind"] == "hf_mixes":
        return mixes.as_it_must_be(line)
    return not any(figures["failed"] for figures in line["precisions"].values())


if __name__ == "__main__":
    raise SystemExit(main())
