"""What went wrong, and the request that shows it."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_KEPT = 3
"""Requests that are kept of each fault of a route."""


@dataclass(slots=True)
class Findings:
    """What came of the requests by route, and the faults with the requests they belong to."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)
    faults: int = 0
    _folder: Path | None = None

    @property
    def cases(self) -> int:
        return sum(sum(counts.values()) for counts in self.outcomes.values())

    def count(self, route: str, outcome: str) -> None:
        self.outcomes.setdefault(route, Counter())[outcome] += 1

    def fault(self, route: str, case: str, what: str, reproduce: str = "") -> None:
        """Note a fault of ``case`` on ``route``; the first ones of each are kept."""
        self.faults += 1
        found = {"route": route, "fault": what[:500]}
        if sum(found.items() <= kept.items() for kept in self.kept) < _KEPT:
            self.kept.append(found | {"case": case[:300], "reproduce": reproduce})

    def as_json(self) -> dict[str, Any]:
        """For the line of results."""
        return {
            "cases": self.cases,
            "outcomes": {route: dict(counts) for route, counts in self.outcomes.items()},
            "faults": self.faults,
            "findings": self.kept,
        }

    def saved(self, body: bytes) -> Path:
        """A file that outlives this run, with the body of a request."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="tandem-fuzz-"))
        path = self._folder / f"{self.faults}.json"
        path.write_bytes(body)
        return path

    def curl(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> str:
        """The command that sends a request again; its body is put into a file."""
        given = "".join(f" -H {shlex.quote(f'{name}: {text}')}" for name, text in headers.items())
        data = f" --data-binary @{self.saved(body)}" if body else ""
        return f"curl -sN -X {method} {shlex.quote(url)}{given}{data}"

    def show(self, console: Console, title: str) -> None:
        """For people."""
        table = Table(title=title, title_justify="left")
        table.add_column("route")
        for name in ("cases", "ok"):
            table.add_column(name, justify="right")
        table.add_column("otherwise")
        for route, counts in sorted(self.outcomes.items()):
            others = ", ".join(f"{code} {n}" for code, n in counts.most_common() if code != "ok")
            table.add_row(route, str(sum(counts.values())), str(counts["ok"]), others)
        console.print(table)
        for found in self.kept:
            console.print(f"{found['route']}: {found['fault']}", style="red", markup=False)
            console.print(
                f"  {found['case']}\n  {found['reproduce']}", markup=False, soft_wrap=True
            )


def until_stopped(work: Callable[[], None]) -> dict[str, Any]:
    """How long ``work`` took, and whether Ctrl-C ended it."""
    interrupted = False
    begun_s = time.monotonic()
    try:
        work()
    except KeyboardInterrupt:
        interrupted = True
    return {"wall_s": time.monotonic() - begun_s, "interrupted": interrupted}


def bar() -> Progress:
    """How far it is, for as long as it runs."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
