"""The Hugging Face worker, measured: what its batch gains, costs and must not change.

    python -m bench.hf --out bench/results/hf.jsonl          all parts, the embedded model
    python -m bench.hf speed --rounds 9 --levels 1 4 8 16
    python -m bench.hf mixes --mixes 2000 --seed 1
    python -m bench.hf precision -n 50
    python -m bench.hf speed --device cuda --model-path DIR  (python -m bench.random_weights DIR)

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
import sys
from collections.abc import Sequence
from typing import Any

from bench.hf import mixes, precision, speed
from bench.processes import Harness
from bench.results import Keep
from bench.session import parsed, parser_of, run_parts

PARTS = ("speed", "mixes", "precision")
ADAPTERS = {name: f"models/adapters/{name}" for name in ("formal", "terse")}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("bench.hf", __doc__, PARTS)
    add = parser.add_argument
    add("--model-path", help="directory or hub id of the checkpoint (the embedded model)")
    add("--dtype", default="auto", help="of the weights, for speed and precision (auto)")
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
    args = parsed(parser, argv, PARTS)
    for name in ("rounds", "requests", "n"):
        if getattr(args, name) < 1:
            parser.error(f"{'-' if name == 'n' else '--'}{name} must be at least 1")
    if args.tokens < 2:
        parser.error("--tokens must be at least 2: speed is measured from the first to the last")
    if min(args.levels) < 1:
        parser.error("--levels must be at least 1")
    args.levels = sorted(set(args.levels))
    return args


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
    return run_parts(parse(sys.argv[1:]), measure, as_it_must_be)


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
