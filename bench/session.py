"""What every benchmark's command does around its parts: results kept as they come, tidy ends."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.processes import Harness, ProcessFailed
from bench.results import Keep, commit

Lines = list[dict[str, Any]]


def parser_of(module: str, description: str | None, parts: Sequence[str]) -> ArgumentParser:
    """What ``python -m module`` of several ``parts`` takes whatever they are."""
    parser = ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (all)")
    add("--device", default="cpu", help="of the workers (cpu)")
    add("--out", type=Path, help="append the JSON lines to this file")
    add("--seed", type=int, default=0, help="of the random choices (0)")
    return parser


def parsed(parser: ArgumentParser, argv: Sequence[str], parts: Sequence[str]) -> Namespace:
    """``argv`` with the parts to run, all if it names none; exits with 2 for an unknown one."""
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in parts:
            parser.error(f"there is no part {part!r}; there are {', '.join(parts)}")
    args.parts = args.parts or list(parts)
    return args


def run_parts(
    args: Namespace,
    measure: Callable[[Namespace, Harness, str, Keep], None],
    as_it_must_be: Callable[[dict[str, Any]], bool],
) -> int:
    """Measure ``args.parts``; the exit code, 1 if a line of results is not ``as_it_must_be``."""

    def work(harness: Harness, keep: Keep) -> None:
        for part in args.parts:
            measure(args, harness, part, keep)

    flags = worker_flags(device=args.device, model_path=args.model_path)
    lines, code = session(work, flags=flags, out=args.out)
    return code or int(not all(map(as_it_must_be, lines)))


def session(
    work: Callable[[Harness, Keep], None], *, flags: tuple[str, ...], out: Path | None
) -> tuple[Lines, int]:
    """Run ``work`` and print the lines of results it kept; ``out`` gets each as soon as it comes.

    Args:
        flags: of every worker that is started.

    Returns:
        The lines and the exit code: 2 if a process did not start or died, 130 after Ctrl-C.
    """
    lines: Lines = []

    def keep(line: dict[str, Any]) -> None:
        lines.append(line)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.write(f"{json.dumps(line)}\n")

    code = 0
    commit()  # what runs from here on, whatever is checked out meanwhile
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        try:
            work(Harness(Path(folder), Console(width=130), flags), keep)
        except ProcessFailed as exc:
            sys.stderr.write(f"error: {exc}\n")
            code = 2
        except KeyboardInterrupt:
            sys.stderr.write("stopped; this is what was measured so far\n")
            code = 130
    for line in lines:
        print(json.dumps(line))
    return lines, code


def worker_flags(*, device: str, model_path: str | None) -> tuple[str, ...]:
    """What every worker is told; a relative path is made absolute, as they run elsewhere."""
    if not model_path:
        return "--device", device
    path = Path(model_path)
    return "--device", device, "--model-path", str(path.resolve()) if path.exists() else model_path
