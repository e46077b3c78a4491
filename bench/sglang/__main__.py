"""The SGLang worker, measured: what it costs SGLang, what it gains, and whether answers are equal.

    python -m bench.sglang --out bench/results/sglang.jsonl        all parts, the embedded model
    python -m bench.sglang overhead gain --rounds 9 --levels 1 8 32
    python -m bench.sglang parity --dtypes float32 bfloat16
    python -m bench.sglang gain --device cuda --model-path DIR     see bench.random_weights

It starts its own workers as real processes and speaks to them over HTTP as clients do. Requests
of overhead and gain share a picture and a conversation of 400 tokens and differ after it; no two
are equal. In every round each level is measured with both sides, one right after the other, and
who goes first takes turns. Ratios are within a round. A round that warms up is not counted.

    overhead    the worker beside its own SGLang server, asked directly with the same prompts
    gain        the SGLang worker beside the Hugging Face worker with a thread a request
                (--batching off), LLaVA's way: 5 at once, the others wait for a slot there
    parity      300 greedy prompts (text, one picture, two, conversations, stop strings, adapters)
                to both kinds, one at a time and eight at once. In float32 all tokens must be
                equal; in bfloat16 each difference is listed with how close the two tokens were.

Prints tables, then one JSON line a result; --out appends these to a file. Ctrl-C keeps what was
measured. Exit code: 1 if a request failed or an answer differed that must not; 2 if a process did
not start or died; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.processes import Harness
from bench.results import Keep
from bench.session import parsed, parser_of, run_parts
from bench.sglang import parity, speed
from bench.sglang.workload import EMBEDDED, Workload
from protocol.messages import WorkerStatus

PARTS = ("overhead", "gain", "parity")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("bench.sglang", __doc__, PARTS)
    add = parser.add_argument
    add("--model-path", help="directory of the checkpoint (the embedded model)")
    speeds = parser.add_argument_group("overhead and gain").add_argument
    speeds("--dtype", default="auto", help="of the weights (auto)")
    speeds("--levels", type=int, nargs="+", default=[1, 8, 32], help="requests at once (1 8 32)")
    speeds("--rounds", type=int, default=5, help="counted rounds (5)")
    speeds("--requests", type=int, default=32, help="requests a measurement, at least (32)")
    speeds("--tokens", type=int, default=64, help="length of an answer (64)")
    same = parser.add_argument_group("parity").add_argument
    same("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(float32 bfloat16)")
    same("-n", type=int, default=300, help="prompts (300)")
    args = parsed(parser, argv, PARTS)
    if min(args.rounds, args.requests, args.n, *args.levels) < 1:
        parser.error("--rounds, --requests, --levels and -n must be at least 1")
    if args.tokens < 2:
        parser.error("--tokens must be at least 2: speed is measured from the first to the last")
    args.levels = sorted(set(args.levels))
    return args


def workload_of(args: argparse.Namespace, status: WorkerStatus) -> Workload:
    """Prompts for the model that ``status`` names."""
    checkpoint = Path(args.model_path) if args.model_path else EMBEDDED
    return Workload(status.model_names[0], checkpoint, tokens=args.tokens)


def measure(args: argparse.Namespace, harness: Harness, part: str, keep: Keep) -> None:
    """Take the figures of one part and keep them."""
    if part == "parity":
        parity.run(
            harness,
            keep,
            dtypes=args.dtypes,
            adapters=not args.model_path,
            number=args.n,
            seed=args.seed,
        )
        return
    compare = speed.overhead if part == "overhead" else speed.gain
    compare(
        harness.with_flags("--dtype", args.dtype),
        keep,
        workload=partial(workload_of, args),
        levels=args.levels,
        rounds=args.rounds,
        requests=args.requests,
    )


def as_it_must_be(line: dict[str, Any]) -> bool:
    """Whether a line of results holds no failure."""
    if line["kind"] == "parity":
        return parity.as_it_must_be(line)
    sides = (side for entry in line["levels"].values() for side in entry.values())
    return not any(side.get("failed") for side in sides)


def main() -> int:
    return run_parts(parse(sys.argv[1:]), measure, as_it_must_be)


if __name__ == "__main__":
    raise SystemExit(main())
