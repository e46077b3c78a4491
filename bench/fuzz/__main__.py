"""Wrong requests through a real controller to a real worker: nothing may break.

    python -m bench.fuzz images --cases 5000 --seed 1
    python -m bench.fuzz images --cases 500 --kind hf
    python -m bench.fuzz openapi --cases 20000 --seed 1 --kind echo

    images      pictures with flipped bits, cut, under wrong headers, of huge declared sizes, bombs,
                lines, animated, in rare modes, with EXIF that lies; and mutated base64 and data
                URIs around them; on LLaVA's route in both framings and on OpenAI's. Every answer
                is a stream or a whole that ends once, or a typed refusal, and no picture may break
                anything: engine_failed, upstream_lost, out_of_memory and deadline_exceeded are
                faults here. A good picture is answered after every 500 cases by the same process,
                memory stays within --memory-mb of the start (a picture of the largest size
                takes 0.2 GB, and each thread that decodes may keep as much for the next one), and
                nothing is left running.
    openapi     what schemathesis makes of the controller's /openapi.json, right and wrong, on all
                routes, those that change the cluster included; and other methods and paths. Every
                4xx and 5xx is a typed error with its own status, and none is engine_failed; at the
                end the worker serves.

It starts its own processes on free ports. Prints a table, the faults with the requests that show
them (of images the bodies are files), and one JSON line; --out appends that to a file. Ctrl-C keeps
what was found. Exit code: 1 for a fault; 2 if a process did not start or died; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.fuzz import images
from bench.processes import Harness
from bench.results import Keep
from bench.session import session


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("part", choices=("images", "openapi"))
    add("--cases", type=int, help="requests (5000 of images, 20000 of openapi)")
    add("--seed", type=int, default=0, help="of the random choices (0)")
    add("--out", type=Path, help="append the JSON line to this file")
    add("--kind", choices=("echo", "hf", "sglang"), default="echo", help="of the worker (echo)")
    only = parser.add_argument_group("images").add_argument
    only("--concurrency", type=int, default=8, help="requests at once (8)")
    only("--memory-mb", type=int, default=2500, help="what a process may grow by (2500)")
    args = parser.parse_args(argv)
    if args.cases is None:
        args.cases = 5000 if args.part == "images" else 20_000
    for name in ("cases", "concurrency", "memory_mb"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main() -> int:
    args = parse(sys.argv[1:])

    def work(harness: Harness, keep: Keep) -> None:
        if args.part == "images":
            images.run(
                harness,
                keep,
                kind=args.kind,
                cases=args.cases,
                seed=args.seed,
                concurrency=args.concurrency,
                memory_mb=args.memory_mb,
            )
        else:
            from bench.fuzz import description  # schemathesis is among the tools of development

            description.run(harness, keep, kind=args.kind, cases=args.cases, seed=args.seed)

    lines, code = session(work, flags=(), out=args.out)
    return code or int(any(line["faults"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
