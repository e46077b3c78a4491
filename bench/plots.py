"""Pictures of results, readable in black and white: a target has its marker, line, hatch and shade.

Each function draws one figure of one file of results, or returns ``None`` where the file has
nothing to draw.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.figures import median_of
from bench.tables import TIMES, load_words, number, ratio_of

if TYPE_CHECKING:  # with numpy it takes a second to import
    from matplotlib.figure import Figure

Found = Mapping[str, Any]

_TEXT = "#24292f"  # becomes the page's own colour where a picture is part of a page
_FAINT = "#8b949e"


@dataclass(frozen=True, slots=True)
class Look:
    """How one target is drawn everywhere."""

    color: str
    marker: str
    line: Any
    hatch: str


LOOKS = (
    Look("#e69f00", "s", (0, (4, 2)), "///"),
    Look("#cc5a8a", "^", (0, (1, 1.5)), "xxx"),
    Look("#1f77b4", "o", "solid", ""),
    Look("#2a9d6f", "D", (0, (6, 2, 1, 2)), "..."),
    Look("#7f6bb3", "v", (0, (3, 1, 1, 1, 1, 1)), "\\\\\\"),
    Look("#8c8c8c", "P", (0, (2, 3)), "++"),
)

_STYLE = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _FAINT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.fonttype": "path",
    "svg.hashsalt": "tandem",
    "figure.constrained_layout.use": True,
}


def _style() -> AbstractContextManager[None]:
    import matplotlib

    style: AbstractContextManager[None] = matplotlib.rc_context(_STYLE)
    return style


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def looks(names: Sequence[str]) -> dict[str, Look]:
    return {name: LOOKS[index % len(LOOKS)] for index, name in enumerate(names)}


# ---------------------------------------------------------------- comparison


def overview(found: Found) -> Figure | None:
    """Requests a second of every workload at its most users, and how many times the first's."""
    groups = at_most_users(found)
    if not groups:
        return None
    names = _names(found)
    figure = _figure(9.6, 3.4)
    axes = figure.subplots()
    width = 0.8 / len(names)
    top = 0.0
    for index, (name, look) in enumerate(looks(names).items()):
        for place, cells in enumerate(groups.values()):
            if (cell := cells.get(name)) is None:
                continue
            rate = cell["summary"]["requests_per_s"]
            x = place + (index - (len(names) - 1) / 2) * width
            _bar(axes, x, rate["median"], width * 0.92, look, name if place == 0 else None)
            axes.errorbar(
                x,
                rate["median"],
                [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]],
                color=_TEXT,
                linewidth=1,
                capsize=2,
            )
            times = (ratio_of(found, cell, "requests_per_s") or {}).get("median")
            words = number(rate["median"]) + (f"\n{number(times, 2)}{TIMES}" if times else "")
            axes.annotate(
                words, (x, rate["max"]), (0, 3), textcoords="offset points", ha="center", fontsize=9
            )
            top = max(top, rate["max"])
    axes.set_xticks(
        range(len(groups)), [f"{w}\n{load_words('closed', level)}" for w, level in groups]
    )
    axes.set_ylim(0, top * 1.28)
    axes.set_ylabel("requests per second")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper left", ncols=len(names))
    return figure


def throughput(found: Found) -> Figure | None:
    """Output tokens a second against the users of the closed loop."""

    def draw(axes: Any, cells: Sequence[Found], look: Look, name: str) -> None:
        rates = [cell["summary"]["output_tokens_per_s"] for cell in cells]
        middle = [rate["median"] for rate in rates]
        below = [rate["median"] - rate["min"] for rate in rates]
        above = [rate["max"] - rate["median"] for rate in rates]
        axes.errorbar(
            [cell["level"] for cell in cells],
            middle,
            [below, above],
            **_line(look, name),
            capsize=2,
            elinewidth=1,
        )

    words = "output tokens per second"
    return _multiples(found, "closed", draw, "users at once", words, from_zero=True)


def latency(found: Found) -> Figure | None:
    """Time to the first token against the users of the closed loop: median and p95."""

    def draw(axes: Any, cells: Sequence[Found], look: Look, name: str) -> None:
        _quantile_lines(axes, cells, look, name, "ttft_s")

    words = "time to first token, ms\nline: median, thin: p95"
    return _multiples(found, "closed", draw, "users at once", words)


def open_latency(found: Found) -> Figure | None:
    """Time to the first token against the offered rate: where it leaves the floor is the knee."""

    groups = _by_workload(found, "open")
    if not groups:
        return None
    figure = _figure(9.6, 3.4)
    left, right = figure.subplots(1, 2)
    workload, cells_of = next(iter(groups.items()))
    for name, look in looks(_names(found)).items():
        if cells := cells_of.get(name):
            _quantile_lines(left, cells, look, name, "ttft_s")
            good = [median_of(cell["summary"], "goodput_per_s") for cell in cells]
            right.plot([cell["level"] for cell in cells], good, **_line(look, name))
    rates = sorted({cell["level"] for cells in cells_of.values() for cell in cells})
    right.plot(rates, rates, color=_FAINT, linewidth=1, label="all of them", zorder=0)
    limits = found["plan"]["limits"]
    left.set_title(f"{workload}: time to first token")
    left.set_ylabel("ms; line: median, thin: p95")
    right.set_title(
        f"{workload}: goodput (TTFT ≤ {limits['ttft_s']:g} s, ITL ≤ {limits['itl_s']:g} s)"
    )
    right.set_ylabel("good requests per second")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("requests offered per second")
        axes.set_xlim(left=0)
    _legend(figure, right)
    return figure


def timelines(found: Found) -> Figure | None:
    """Each request with the most users as a line: thin until its first token, thick as it streams.

    Of the first workload.
    """
    groups = at_most_users(found)
    if not groups:
        return None
    (workload, level), cells = next(iter(groups.items()))
    return _timelines(found, f"{workload}, {load_words('closed', level)}", cells)


def trace(found: Found) -> Figure | None:
    """Each request of a replayed trace as a line: thin until its first token, then thick."""
    by_target = _by_workload(found, "trace").get("trace")
    if by_target is None:
        return None
    return _timelines(found, "trace", {name: cells[0] for name, cells in by_target.items()})


def _timelines(found: Found, words: str, cells: Mapping[str, Found]) -> Figure:
    figure = _figure(9.6, 1.1 + 2.1 * len(cells))
    rows: Any = figure.subplots(len(cells), 1, sharex=True, squeeze=False)[:, 0]
    end_s = 0.0
    for axes, (name, cell) in zip(rows, cells.items(), strict=True):
        look = looks(_names(found))[name]
        for place, one in enumerate(cell["timeline"]):
            if one["end"] not in ("stop", "length"):
                axes.plot([one["end_s"]], [place], marker="x", color=_TEXT, markersize=4)
                continue
            first_s = one["first_s"] if one["first_s"] is not None else one["end_s"]
            axes.plot([one["sent_s"], first_s], [place] * 2, color=_FAINT, linewidth=0.8)
            axes.plot([first_s, one["end_s"]], [place] * 2, color=look.color, linewidth=1.8)
            axes.plot([first_s], [place], marker="|", color=_TEXT, markersize=4)
            end_s = max(end_s, one["end_s"])
        axes.set_title(name)
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    rows[-1].set_xlabel(
        f"seconds; {words}: thin line: waits for its first token (tick), thick: streams, "
        f"{TIMES}: no answer"
    )
    rows[-1].set_xlim(0, end_s * 1.02)
    return figure


def processes(found: Found) -> Figure | None:
    """Processor time a token and memory, by process."""
    groups = at_most_users(found)
    if not groups:
        return None
    (workload, level), cells = next(iter(groups.items()))
    roles = dict.fromkeys(
        role for cell in cells.values() for role in cell["summary"].get("rss_bytes") or {}
    )
    if not roles:
        return None
    figure = _figure(9.6, 0.9 + 0.55 * len(cells))
    left, right = figure.subplots(1, 2)
    for axes, key, scale, words in (
        (left, "cpu_ms_per_token", 1.0, "ms of processor per output token"),
        (right, "rss_bytes", 1e-6, "MB resident"),
    ):
        for place, cell in enumerate(cells.values()):
            begin = 0.0
            for role, look in looks(list(roles)).items():
                value = (median_of(cell["summary"], key, role) or 0) * scale
                axes.barh(
                    place,
                    value,
                    left=begin,
                    height=0.6,
                    color=look.color,
                    hatch=look.hatch,
                    edgecolor=_TEXT,
                    linewidth=0.6,
                    label=role if place == 0 else None,
                )
                begin += value
            axes.annotate(f" {number(begin)}", (begin, place), va="center", fontsize=9)
        axes.set_yticks(range(len(cells)), list(cells))
        axes.invert_yaxis()
        axes.set_xlabel(words)
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    left.set_title(f"{workload}, {load_words('closed', level)}")
    _legend(figure, right)
    return figure


# ---------------------------------------------------------------- overhead


def overhead(found: Found) -> Figure | None:
    """What the controller adds, against the number of streams."""
    levels = found["levels"]
    if not levels:
        return None
    streams = [level["streams"] for level in levels]
    figure = _figure(9.6, 3.2)
    left, middle, right = figure.subplots(1, 3)
    direct, through = LOOKS[0], LOOKS[2]

    def line(axes: Any, values: Sequence[float | None], look: Look, label: str) -> None:
        pairs = [(x, y) for x, y in zip(streams, values, strict=True) if y is not None]
        axes.plot([x for x, _ in pairs], [y for _, y in pairs], **_line(look, label))

    for side, look in (("direct", direct), ("controller", through)):
        for axes, *key, scale in (
            (left, "paced", side, "ttft_s", "p50", 1e3),
            (right, "flat_out", side, "output_tokens_per_s", 1e-3),
        ):
            values = [median_of(level, *key) for level in levels]
            line(axes, [None if v is None else v * scale for v in values], look, side)
    cpu = [
        median_of(level, "paced", "controller", "controller_cpu_us_per_token") for level in levels
    ]
    line(middle, cpu, through, "controller")
    left.set_title("time to first token, ms")
    middle.set_title("controller: CPU µs per token")
    right.set_title("flat out: thousand tokens/s")
    for axes in (left, middle, right):
        _users_axis(axes, streams)
        axes.set_xlabel("streams at once")
        axes.set_ylim(bottom=0)
    _legend(figure, left)
    return figure


# ---------------------------------------------------------------- what they share

DRAWN: Mapping[str, Mapping[str, Callable[[Found], Figure | None]]] = {
    "compare": {
        "overview": overview,
        "throughput": throughput,
        "latency": latency,
        "open": open_latency,
        "timelines": timelines,
        "trace": trace,
        "processes": processes,
    },
    "overhead": {"overhead": overhead},
}


def pictures(found: Found) -> dict[str, Figure]:
    """All figures of a file of results, by name."""
    with _style():
        drawn = {name: draw(found) for name, draw in DRAWN.get(found["kind"], {}).items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(figure: Figure, path: Path) -> None:
    """Write a picture that stands alone: dark on white; its format follows from the name."""
    with _style():
        extra = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
        figure.savefig(path, facecolor="white", **extra)


def inline(figure: Figure) -> str:
    """An SVG to put into a page, in the page's own colour of text."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)  # as wide as the page


def _names(found: Found) -> list[str]:
    return list(found["parity"]["targets"])


def _by_workload(found: Found, mode: str) -> dict[str, dict[str, list[Found]]]:
    """Cells by workload and target, in the order of their load."""
    groups: dict[str, dict[str, list[Found]]] = {}
    for cell in sorted(found["cells"], key=lambda cell: float(cell["level"])):
        if cell["mode"] == mode:
            groups.setdefault(cell["workload"], {}).setdefault(cell["target"], []).append(cell)
    order = [*found["plan"]["workloads"], "trace"]
    return dict(sorted(groups.items(), key=lambda group: order.index(group[0])))


def at_most_users(found: Found) -> dict[tuple[str, float], dict[str, Found]]:
    """Of each workload the cells of the closed loop with the most users, by target."""
    groups = {}
    for workload, by_target in _by_workload(found, "closed").items():
        level = max(cell["level"] for cells in by_target.values() for cell in cells)
        groups[workload, level] = {
            name: cell
            for name in _names(found)
            for cell in by_target.get(name, ())
            if cell["level"] == level
        }
    return groups


def _multiples(
    found: Found,
    mode: str,
    draw: Callable[[Any, Sequence[Found], Look, str], None],
    x_words: str,
    y_words: str,
    *,
    from_zero: bool = False,
) -> Figure | None:
    """One small picture a workload, side by side."""
    groups = _by_workload(found, mode)
    if not groups:
        return None
    figure = _figure(9.6, 3.2)
    row: Any = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (workload, by_target) in zip(row, groups.items(), strict=True):
        for name, look in looks(_names(found)).items():
            if cells := by_target.get(name):
                draw(axes, cells, look, name)
        levels = sorted({cell["level"] for cells in by_target.values() for cell in cells})
        _users_axis(axes, levels)
        axes.set_title(workload)
        axes.set_xlabel(x_words)
        if from_zero:
            axes.set_ylim(bottom=0)
    row[0].set_ylabel(y_words)
    _legend(figure, row[0])
    return figure


def _quantile_lines(
    axes: Any, cells: Sequence[Found], look: Look, name: str, latency_name: str
) -> None:
    for share, width, label in (("p50", 1.8, name), ("p95", 0.8, None)):
        points = [
            (cell["level"], 1e3 * found)
            for cell in cells
            if (found := median_of(cell["summary"], latency_name, share)) is not None
        ]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        style = _line(look, label) | {"linewidth": width}
        if label is None:
            style |= {"markersize": 3.5, "markerfacecolor": "none"}
        axes.plot(xs, ys, **style)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _users_axis(axes: Any, levels: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [f"{level:.0f}" for level in levels])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _line(look: Look, label: str | None) -> dict[str, Any]:
    return {
        "color": look.color,
        "marker": look.marker,
        "linestyle": look.line,
        "label": label,
        "markeredgecolor": _TEXT,
        "markeredgewidth": 0.6,
    }


def _bar(axes: Any, x: float, height: float, width: float, look: Look, label: str | None) -> None:
    axes.bar(
        x,
        height,
        width,
        color=look.color,
        hatch=look.hatch,
        edgecolor=_TEXT,
        linewidth=0.7,
        label=label,
    )


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
