"""The terminal: a live table while models load, one calm table, then a line per event.

Where the output is no terminal, plain lines say the same. An output that is closed or full is
ignored: nobody watching is no reason to stop serving.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.plan import Role
from cluster.state import ClusterRecord, ProcessRecord, State

COLOURS = {
    State.READY: "green",
    State.STARTING: "cyan",
    State.RESTARTING: "yellow",
    State.STOPPING: "yellow",
    State.FAILED: "red",
    State.SILENT: "red",
}
EMBEDDED = "pocket-llava"
EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
"""Requests about a picture that the embedded model can answer, one for each kind of worker."""

PLAIN_WIDTH = 200
"""Columns where the output is no terminal: nothing is wrapped or cut."""


class QuietConsole(Console):
    """A console that falls silent when its reader has left."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError):
            super().print(*objects, **options)


def make_console(*, stderr: bool = False) -> Console:
    console = QuietConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


class View:
    """What ``up`` shows."""

    def __init__(self, console: Console, *, options: str = "") -> None:
        """``options`` are what `status` and `down` have to be given to find this cluster."""
        self._console = console
        self._options = options
        self._spinner = Spinner("dots")
        self._begun = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    @property
    def live(self) -> bool:
        """Whether the table of loading processes is worth drawing."""
        return self._live is not None

    def draw(self, cluster: ClusterRecord) -> None:
        """Redraw the table of loading processes."""
        if self._live is None:
            return
        with suppress(OSError):
            self._live.start()
            self._live.update(self._loading(cluster), refresh=True)

    def event(
        self,
        name: str,
        what: str,
        lines: Sequence[str] = (),
        *,
        log: Path | None = None,
        passing: bool = False,
    ) -> None:
        """One thing that happened to one process; ``passing`` ones the live table shows too."""
        if passing and self._console.is_terminal:
            return
        self.note(f"{name} {what}")
        for line in lines:
            self._print(Text(f"           | {line}", style="dim"))
        if log is not None:
            self._print(Text(f"           the whole log: {log}", style="dim"))

    def note(self, sentence: str) -> None:
        self._print(Text.assemble((time.strftime("%H:%M:%S"), "dim"), "  ", sentence))

    def ready(self, cluster: ClusterRecord, took_s: float) -> None:
        """The table of what is where, and what to try."""
        self.close()
        self._print("")
        self._print(process_table(cluster.processes))
        self._print("")
        missing = ", ".join(p.name for p in cluster.processes if not _up(p))
        self._print(f"ready in {took_s:.1f} s" + (f", but without {missing}" if missing else ""))
        for line in next_steps(cluster, self._options):
            self._print(line)

    def close(self) -> None:
        """End the live table; plain lines from here on."""
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
            self._live = None

    def _loading(self, cluster: ClusterRecord) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for process in cluster.processes:
            busy = process.state in (State.STARTING, State.RESTARTING)
            sign: RenderableType = self._spinner if busy else Text("✓" if _up(process) else "·")
            table.add_row(sign, process.name, _state(process), Text(process.progress, style="dim"))
        elapsed = Text(f"{time.monotonic() - self._begun:.0f} s", style="dim")
        table.add_row("", "", elapsed, "")
        return table

    def _print(self, what: RenderableType) -> None:
        self._console.print(what, soft_wrap=not isinstance(what, Table))


def process_table(processes: Sequence[ProcessRecord]) -> Table:
    """What is where."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("name", "kind", "model", "device", "address", "pid", "state"):
        table.add_column(column, overflow="fold", no_wrap=column in ("address", "pid"))
    for process in processes:
        table.add_row(
            process.name,
            process.kind,
            process.model or "-",
            " ".join(part for part in (process.device, process.precision) if part) or "-",
            process.address or "-",
            str(process.pid or "-"),
            _state(process).append(_detail(process), style="dim"),
        )
    return table


def next_steps(cluster: ClusterRecord, options: str = "") -> list[str]:
    """What to try, ready to paste."""
    address = cluster.controller_address or ""
    workers = [
        process for process in cluster.processes if process.role is Role.WORKER and process.model
    ]
    lines = [""]
    examples = [
        path
        for kind in dict.fromkeys(worker.kind for worker in workers if worker.model == EMBEDDED)
        if (path := EXAMPLES / f"ask-{kind}.json").exists()
    ]
    if examples:
        lines += ["Ask each kind of worker about docs/pictures/red-circle.png (answers stream):"]
        lines += [f"  {_curl(address)} -d @{_shown(path)}" for path in examples]
        lines += [""]
    elif workers:
        model = next((w.model for w in workers if w.state is State.READY), workers[0].model)
        body = {
            "model": model.split(", ")[0],
            "stream": True,
            "messages": [{"role": "user", "content": "Hello! What can you do?"}],
        }
        lines += [
            "Ask it something (the answer streams):",
            f"  {_curl(address)} -d {shlex.quote(json.dumps(body))}",
            "",
        ]
    pages = [process for process in cluster.processes if process.role is Role.PAGE and _up(process)]
    lines += [f"Chat:              {page.address} in a browser" for page in pages]
    lines += [
        f"OpenAI clients:    base URL {address}/v1; any API key, unless yours asks for one",
        f"What it does:      {address}/cluster and {address}/metrics",
        f"Another terminal:  python -m cluster status{options}",
        f"                   python -m cluster down{options}",
        "Here:              Ctrl-C stops everything",
    ]
    return lines


def _curl(address: str) -> str:
    return f"curl -N {address}/v1/chat/completions -H 'Content-Type: application/json'"


def _shown(path: Path) -> str:
    """``path`` as short as it can be pasted here."""
    return shlex.quote(os.path.relpath(path))


def _state(process: ProcessRecord) -> Text:
    text = Text(process.state, style=COLOURS.get(process.state, ""))
    if process.restarts:
        text.append(f" (restarts: {process.restarts})", style="dim")
    return text


def _detail(process: ProcessRecord) -> str:
    ended = process.state in (State.FAILED, State.RESTARTING, State.STOPPED)
    detail = process.last_exit if ended else process.progress
    return f": {detail}" if detail else ""


def _up(process: ProcessRecord) -> bool:
    return process.state is State.READY
