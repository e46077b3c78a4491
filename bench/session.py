"""What every benchmark's command does around its parts: results kept as they come, tidy ends."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.processes import Harness, ProcessFailed
from bench.results import Keep, commit

Lines = list[dict[str, Any]]


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
