"""Results as tables for a terminal. A speed is not shown without its parity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from bench.figures import median_of

Found = Mapping[str, Any]

TIMES = "\N{MULTIPLICATION SIGN}"
LOOPS = {"closed": "closed loop", "open": "open loop", "trace": "replayed"}
LATE_S = 0.025
"""A generator that sends later than this is worth a warning."""


def number(value: float | None, digits: int = 3) -> str:
    """To a few significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def over_rounds(spread: Found | None, scale: float = 1.0) -> str:
    """Median (least-most)."""
    if not spread:
        return "-"
    middle = number(spread["median"] * scale)
    least, most = (number(spread[key] * scale, 2) for key in ("min", "max"))
    return middle if spread["min"] == spread["max"] else f"{middle} ({least}-{most})"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def milliseconds(summary: Found, name: str, *shares: str) -> str:
    """The medians of some quantiles of a latency."""
    found = (median_of(summary, name, share) for share in shares)
    return " / ".join("-" if s is None else f"{1e3 * s:.{int(s < 0.01)}f}" for s in found)


def counts(found: Mapping[str, int]) -> str:
    """Refusals or failures with their codes."""
    return ", ".join(f"{count} {TIMES} {code}" for code, count in sorted(found.items())) or "0"


def parity_table(found: Found) -> Table:
    parity = found["parity"]
    title = f"{parity['questions']} fixed greedy questions to every target"
    drawn = Table("target", title=title, title_justify="left")
    for column in ("answered", f"equal to {parity['reference']}", "exact", "right"):
        drawn.add_column(column, justify="right")
    for name, told in parity["targets"].items():
        drawn.add_row(
            name,
            f"{told['answered']}/{parity['questions']}" + _codes(told["not_answered"]),
            *(percent(told[key]) for key in ("equal", "exact", "right")),
        )
    return drawn


def _codes(codes: list[str]) -> str:
    return f" ({', '.join(codes)})" if codes else ""


def load_words(mode: str, level: float) -> str:
    return f"{level:.0f} at once" if mode == "closed" else f"{number(level)}/s"


def cell_tables(found: Found) -> list[Table]:
    """One table for each workload and loop."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for cell in found["cells"]:
        groups.setdefault((cell["workload"], cell["mode"]), []).append(cell)
    return [_cell_table(found, workload, mode, cells) for (workload, mode), cells in groups.items()]


_COLUMNS = (
    *("requests/s", "tokens/s", "TTFT ms", "ITL ms", "TPOT ms", "whole s"),
    *("good", "cached", "ref/fail", "equal", "times"),
)


def _cell_table(found: Found, workload: str, mode: str, cells: list[Found]) -> Table:
    rounds = max(len(cell["rounds"]) for cell in cells)
    title = f"{workload}, {LOOPS[mode]}: median (least-most) of {rounds} rounds"
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("users" if mode == "closed" else "offered/s", justify="right", no_wrap=True)
    drawn.add_column("target", no_wrap=True)
    for column in _COLUMNS:
        drawn.add_column(column, justify="right", no_wrap=True)
    told = found["parity"]["targets"]
    last = None
    for cell in sorted(cells, key=lambda cell: float(cell["level"])):  # stable: targets in order
        summary = cell["summary"]
        drawn.add_row(
            number(cell["level"]) if cell["level"] != last else "",
            cell["target"],
            over_rounds(summary["requests_per_s"]),
            number(median_of(summary, "output_tokens_per_s")),
            milliseconds(summary, "ttft_s", "p50", "p95"),
            milliseconds(summary, "itl_s", "p50", "p99"),
            milliseconds(summary, "tpot_s", "p50"),
            " / ".join(
                number(median_of(summary, "duration_s", share), 2) for share in ("p50", "p99")
            ),
            percent(median_of(summary, "good_share")),
            percent(median_of(summary, "cached_share")),
            "/".join(str(sum(summary[key].values())) for key in ("refused", "failed")),
            percent(told[cell["target"]]["equal"]),
            over_rounds(ratio_of(found, cell, "requests_per_s")),
        )
        last = cell["level"]
    return drawn


def legend(found: Found) -> str:
    """What the columns of the tables are."""
    limits = found["plan"]["limits"]
    return (
        "tokens/s: of answers; TTFT, to the first text: median / p95; ITL, gaps between deltas: "
        "median / p99; whole: the answer, median / p99; ref/fail: refused (429, 503), failed; "
        f"good: TTFT <= {limits['ttft_s']:g} s and 95 % of gaps <= {limits['itl_s']:g} s; "
        "equal: answers that are the first target's; times: requests/s to the first target's, "
        "within a round"
    )


def ratio_of(found: Found, cell: Found, name: str) -> Found | None:
    """A cell's ratio to the first target."""
    for entry in found["ratios"]:
        if all(entry[key] == cell[key] for key in ("workload", "mode", "level", "target")):
            ratio: Found | None = entry[name]
            return ratio
    return None


def warnings(found: Found) -> list[str]:
    """What a reader must know before the figures."""
    said = [f"{name} is dead: {t['dead']}" for name, t in found["targets"].items() if t["dead"]]
    if found["interrupted"]:
        said.append("stopped before its end: this is what was measured so far")
    for key in ("refused", "failed"):
        codes: dict[str, dict[str, int]] = {}
        for cell in found["cells"]:
            for code, count in cell["summary"][key].items():
                its = codes.setdefault(cell["target"], {})
                its[code] = its.get(code, 0) + count
        said += [f"{name} {key} {counts(its)}" for name, its in codes.items()]
    late = [
        f"{cell['workload']}, {load_words(cell['mode'], cell['level'])}, {cell['target']}"
        for cell in found["cells"]
        if (median_of(cell["summary"], "late_s", "p99") or 0) > LATE_S
    ]
    if late:
        said.append(
            f"the generator sent 1 % of requests more than {1e3 * LATE_S:.0f} ms late in "
            f"{len(late)} of {len(found['cells'])} measurements, first in {late[0]}: "
            "it shares the machine with what it measures"
        )
    deltas = sorted({c["target"] for c in found["cells"] if c["summary"]["tokens_are_deltas"]})
    if deltas:
        said.append(f"{', '.join(deltas)}: says no token counts, so that deltas are counted")
    return said
