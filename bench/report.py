"""A comparison as one page that needs nothing else: pictures first, then every figure."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plots, tables
from bench.figures import median_of
from bench.results import rounded
from bench.tables import (
    LOOPS,
    TIMES,
    counts,
    load_words,
    milliseconds,
    number,
    over_rounds,
    percent,
    ratio_of,
)

Found = Mapping[str, Any]

_CAPTIONS = {
    "overview": f"Requests per second at the most users; {TIMES}: to the first target's.",
    "throughput": "Output tokens per second against users: where the line goes flat, more users "
    "only wait longer. Whiskers: least and most of the rounds.",
    "latency": "How long a user waits for the first token.",
    "open": "Requests that come at their own pace (Poisson), whatever has become of those before. "
    "Left of the knee the wait stays flat; right of it the queue grows. The "
    "grey line is what was offered: a target that keeps up lies just under it, as the wait for the "
    "last answer counts, too.",
    "timelines": "Every request of the last round from top to bottom as it was sent.",
    "trace": "Every request of the trace from top to bottom, when the trace says it comes.",
    "processes": "What each process behind a target used; the controller's share is its own.",
}


def write(path: Path, found: Found) -> None:
    """Write the page of a comparison to ``path``.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found))


def page(found: Found) -> str:
    """The page of a comparison."""
    drawn = {name: plots.inline(figure) for name, figure in plots.pictures(found).items()}
    parts = [
        _head(found),
        *(f'<p class="note">{_safe(said)}.</p>' for said in tables.warnings(found)),
        _headline(found),
        _figure(drawn, "overview"),
        "<h2>Is the answer the same?</h2>",
        _truth(found),
        "<h2>How much, and how fast?</h2>",
        *(_figure(drawn, name) for name in ("throughput", "latency", "open", "timelines", "trace")),
        "<h2>What does it use?</h2>",
        _figure(drawn, "processes"),
        "<h2>All figures</h2>",
        *_cells(found),
        "<h2>How this was measured</h2>",
        _how(found),
    ]
    title = f"{' · '.join(found['targets'])}: compared by Tandem"
    return _PAGE.format(title=_safe(title), style=_STYLE, body="\n".join(filter(None, parts)))


def _safe(text: object) -> str:
    return html.escape(str(text))


def _figure(drawn: Mapping[str, str], name: str) -> str:
    if name not in drawn:
        return ""
    return f"<figure>{drawn[name]}<figcaption>{_CAPTIONS[name]}</figcaption></figure>"


def _head(found: Found) -> str:
    machine = found["machine"]
    where = ", ".join([f"{machine['cores']} {TIMES} {machine['cpu']}", *machine["gpus"]])
    return (
        f"<h1>{_safe(' against '.join(found['targets']))}</h1>"
        f'<p class="lead">{_safe(found["date"][:16].replace("T", " "))} UTC · {_safe(where)} · '
        f"commit {_safe(found['commit'])} · {found['plan']['rounds']} rounds</p>"
    )


def _headline(found: Found) -> str:
    """The largest ratios in words."""
    cards = []
    for (workload, level), cells in plots.at_most_users(found).items():
        for name, cell in cells.items():
            ratio = ratio_of(found, cell, "requests_per_s")
            if ratio:
                equal = percent(found["parity"]["targets"][name]["equal"])
                cards.append(
                    f'<div class="card"><b>{number(ratio["median"], 2)}{TIMES}</b>'
                    f"<span>{_safe(name)} on {_safe(workload)}<br>{load_words('closed', level)}, "
                    f"{equal} equal answers</span></div>"
                )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _truth(found: Found) -> str:
    parity = found["parity"]
    rows = [
        (
            name,
            f"{told['answered']}/{parity['questions']}",
            percent(told["equal"]),
            percent(told["exact"]),
            percent(told["right"]),
        )
        for name, told in parity["targets"].items()
    ]
    heads = ("target", "answered", f"equal to {parity['reference']}", "exact", "right")
    shown = "".join(_question(one) for one in parity["shown"])
    different = "".join(
        f"<li><i>{_safe(one['question'])}</i> ({_safe(one['sort'])})<br>{_answers(one['answers'])}"
        for one in parity["different"]
    )
    return (
        _table(heads, rows)
        + f'<div class="asked">{shown}</div>'
        + (f"<h3>Where they differ</h3><ul>{different}</ul>" if different else "")
    )


def _question(one: Found) -> str:
    return (
        f'<div><img alt="" src="data:image/png;base64,{one["image"]}">'
        f"<p><i>{_safe(one['question'])}</i><br>{_answers(one['answers'])}</p></div>"
    )


def _answers(answers: Mapping[str, str]) -> str:
    """Answers with who gave them; the same one once."""
    by_text: dict[str, list[str]] = {}
    for name, text in answers.items():
        by_text.setdefault(text, []).append(name)
    return "<br>".join(
        f"{_safe(text) or '(nothing)'} <small>{_safe(', '.join(names))}</small>"
        for text, names in by_text.items()
    )


_COLUMNS = (
    *("load", "target", "requests/s", "times", "output tok/s", "total tok/s", "images/s"),
    *("TTFT ms<br>p50 / p90 / p95 / p99", "ITL ms<br>p50 / p90 / p95 / p99"),
    *("TPOT ms<br>p50 / p90 / p95 / p99", "whole ms<br>p50 / p90 / p95 / p99"),
    *("goodput/s", "cached", "tok/delta", "refused", "failed", "equal", "lag ms<br>p99"),
)
_SHARES = ("p50", "p90", "p95", "p99")


def _cells(found: Found) -> Iterable[str]:
    groups: dict[tuple[str, str], list[Found]] = {}
    for cell in sorted(found["cells"], key=lambda cell: float(cell["level"])):
        groups.setdefault((cell["workload"], cell["mode"]), []).append(cell)
    for (workload, mode), cells in sorted(groups.items()):
        what = found["workloads"].get(workload, {})
        told = f"{what['what']}; can be reused: {what['shares']}" if what else ""
        rows = [_row(found, cell) for cell in cells]
        table = _table(_COLUMNS, rows, escape_heads=False, kind="wide cells")
        head = f"<h3>{_safe(workload)}, {LOOPS[mode]}</h3>"
        yield f'{head}<p class="what">{_safe(told)}</p>{table}'


def _row(found: Found, cell: Found) -> Sequence[str]:
    summary = cell["summary"]
    return (
        load_words(cell["mode"], cell["level"]),
        cell["target"],
        over_rounds(summary["requests_per_s"]),
        over_rounds(ratio_of(found, cell, "requests_per_s")),
        over_rounds(summary["output_tokens_per_s"]),
        over_rounds(summary["total_tokens_per_s"]),
        number(median_of(summary, "images_per_s")),
        *(milliseconds(summary, name, *_SHARES) for name in ("ttft_s", "itl_s", "tpot_s")),
        milliseconds(summary, "duration_s", *_SHARES),
        over_rounds(summary["goodput_per_s"]),
        percent(median_of(summary, "cached_share")),
        number(median_of(summary, "tokens_per_delta")),
        counts(summary["refused"]),
        counts(summary["failed"]),
        percent(found["parity"]["targets"][cell["target"]]["equal"]),
        milliseconds(summary["generator"], "lag_s", "p99"),
    )


def _how(found: Found) -> str:
    facts = {
        "command": found["command"],
        "plan": found["plan"],
        "machine": found["machine"],
        "targets": {
            name: {key: value for key, value in target.items() if value not in (None, [], ())}
            for name, target in found["targets"].items()
        },
    }
    told = json.dumps(rounded(facts), indent=1)
    return (
        "<p>TTFT: from sending to the first delta with text. ITL: each gap between two deltas. "
        "TPOT: (whole - TTFT) / (output tokens - 1). Goodput: answered requests within the limits "
        f"(TTFT {found['plan']['limits']['ttft_s']:g} s; 95 % of the gaps "
        f"{found['plan']['limits']['itl_s']:g} s). Figures are medians of the rounds, least and "
        "most in parentheses. Refused: 429 and 503; failed: anything else that is no answer. Lag: "
        "how late the load generator's own event loop was.</p>"
        f"<details><summary>Versions, hardware, flags, seeds</summary><pre>{_safe(told)}</pre>"
        "</details>"
    )


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    escape_heads: bool = True,
    kind: str = "wide",
) -> str:
    head = "".join(f"<th>{_safe(text) if escape_heads else text}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{_safe(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="{kind}">{table}</div>'


_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #24292f; --soft: #57606a; --line: #d0d7de;
  --card: #f6f8fa; --note: #9a6700; --shade: #fff8c5; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --soft: #9198a1;
  --line: #30363d; --card: #161b22; --note: #e3b341; --shade: #272115; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); margin: 0 auto; max-width: 1080px;
  padding: 2rem 1.25rem 4rem; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line);
  padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; }
.lead, .what, figcaption, small { color: var(--soft); }
.what { margin: 0 0 .5rem; }
.note { background: var(--shade); color: var(--note); border-radius: 6px; padding: .5rem .8rem;
  margin: .5rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem 1rem; display: flex; gap: .75rem; align-items: center; }
.card b { font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.card span { font-size: .85rem; color: var(--soft); line-height: 1.35; }
figure { margin: 1.25rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; margin-top: .25rem; }
.asked { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1rem;
  margin: 1.25rem 0; }
.asked div { display: flex; gap: .75rem; align-items: flex-start; }
.asked img { width: 84px; height: 84px; object-fit: cover; border-radius: 6px;
  border: 1px solid var(--line); flex: none; }
.asked p { margin: 0; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; vertical-align: bottom; white-space: nowrap; }
td { text-align: right; white-space: nowrap; }
th, td { padding: .28rem .7rem .28rem 0; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .cells th:nth-child(2), .cells td:nth-child(2) { text-align: left; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  overflow-x: auto; font-size: .78rem; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
