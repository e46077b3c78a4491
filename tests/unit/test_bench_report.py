"""The report, the tables and the pictures of results made by hand."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from bench import figures as fig
from bench import files, plots, report, tables
from bench.compare import Cell, Comparison, Plan, ratios
from bench.cross_check import differences
from bench.figures import Limits
from bench.parity import compared
from bench.targets import Target
from bench.wire import Ask, Reply
from models.pocket.scenes import png

LIMITS = Limits(ttft_s=1.0, itl_s=0.5)
PIXEL = base64.b64encode(png(Image.new("RGB", (1, 1)))).decode()


def reply(begin: float, length: float, end: str = "stop", code: str = "") -> Reply:
    at = () if end in ("refused", "failed") else (begin + length / 2, begin + length)
    return Reply(end, begin, begin + length, code=code, delta_at=at, output_tokens=2, text="red")


def measured(replies: list[Reply]) -> dict[str, Any]:
    use = {
        "cpu_s": {"worker": 0.5},
        "rss_bytes": {"worker": 10**8},
        "cpu_ms_per_token": {"worker": 2.0},
    }
    lag = {"generator": {"lag_s": fig.quantiles([0.001]), "cpu_s": 0.1}}
    return fig.figures(replies, LIMITS) | use | lag


def results(*, names: tuple[str, ...] = ("old <b>", "new"), broken: bool = False) -> dict[str, Any]:
    """A comparison in which the second target is twice as fast, or answers nothing."""
    asked = [("colour", Ask((("user", "<image>What?"),), (PIXEL,), answer="red"))]
    cells = []
    for mode, levels in (("closed", (1, 4)), ("open", (2.0, 3.5))):
        for level in levels:
            for index, name in enumerate(names):
                bad = ("refused", "429 overloaded") if broken and index else ("stop", "")
                told = [reply(0.1 * n, 0.4 / (1 + index), *bad) for n in range(4)]
                rounds = {0: measured(told), 1: measured(told)}
                cells.append(Cell("vqa", mode, level, name, rounds, fig.timeline(told)))  # type: ignore[arg-type]
    return {
        "schema": files.SCHEMA,
        "kind": "compare",
        "date": "2026-11-20T10:00:00+00:00",
        "command": "python -m bench compare",
        "commit": "abc",
        "interrupted": broken,
        "machine": {"cpu": "a CPU", "cores": 2, "gpus": []},
        "plan": {"rounds": 2, "workloads": ["vqa"], "limits": {"ttft_s": 1.0, "itl_s": 0.5}},
        "workloads": {"vqa": {"what": "one picture", "shares": "it"}},
        "targets": {name: {"dead": None, "not_flushed": []} for name in names},
        "parity": compared(asked, {name: [reply(0.0, 0.2)] for name in names}),
        "cells": [cell.as_json() for cell in cells],
        "ratios": ratios(cells),
    }


def printed(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(tables.parity_table(found), *tables.cell_tables(found))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_page_needs_nothing_else_and_escapes_names() -> None:
    page = report.page(results())
    assert "old &lt;b&gt;" in page
    assert "old <b>" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import""", page)
    assert page.count("<svg") == 6
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert plots._TEXT not in page.partition("<body>")[2]
    assert f"data:image/png;base64,{PIXEL}" in page
    assert f"1.4{tables.TIMES}</b>" in page
    assert page.index("Is the answer the same?") < page.index("How much, and how fast?")


def test_what_was_refused_is_told_in_page_and_table() -> None:
    found = results(broken=True)
    assert f"8 {tables.TIMES} 429 overloaded" in report.page(found)
    row = next(line for line in printed(found).splitlines() if "new" in line and "/0" in line)
    assert "8/0" in row
    said = " ".join(tables.warnings(found))
    assert "stopped before its end" in said
    assert f"new refused 32 {tables.TIMES} 429 overloaded" in said


def test_a_row_has_its_parity_beside_its_speed() -> None:
    row = next(
        line for line in printed(results()).splitlines() if "new" in line and "closed" not in line
    )
    assert "100 %" in row


def test_a_speed_without_its_truth_is_left_out() -> None:
    target = Target("a", "http://127.0.0.1:1", "tandem", "m")
    comparison = Comparison(Plan(), [target], Console(file=io.StringIO()))
    comparison._cells["vqa", "closed", 1, "a"] = Cell("vqa", "closed", 1, "a")
    found = comparison.results()
    assert found["parity"] is None
    assert found["cells"] == []


def test_a_late_generator_is_told() -> None:
    found = results()
    assert tables.warnings(found) == []
    found["cells"][0]["summary"]["late_s"]["p99"]["median"] = 0.2
    (said,) = tables.warnings(found)
    assert "late" in said


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_pictures_stand_alone_and_are_the_same_each_time(tmp_path: Path, suffix: str) -> None:
    drawn = plots.pictures(results())
    assert set(drawn) == {*("overview", "throughput", "latency", "open", "timelines", "processes")}
    seen = []
    for _ in range(2):
        plots.save(plots.pictures(results())["overview"], tmp_path / f"a{suffix}")
        seen.append((tmp_path / f"a{suffix}").read_bytes())
    assert seen[0] == seen[1]


def test_targets_differ_without_color() -> None:
    for what in ("marker", "line", "hatch"):
        assert len({str(getattr(look, what)) for look in plots.LOOKS}) == len(plots.LOOKS)


def test_files_are_read_back_and_others_refused(tmp_path: Path) -> None:
    file = tmp_path / "below" / "a.json"
    found = results()
    files.write(file, found)
    assert files.read(file)["cells"][0]["workload"] == "vqa"
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]
    assert printed(files.read(file)) == printed(found)
    file.write_text(json.dumps({"schema": "tandem.bench/0"}))
    with pytest.raises(files.FileError, match="bench/0"):
        files.read(file)
    file.write_text("{")
    with pytest.raises(files.FileError, match="cannot be read"):
        files.read(file)


def test_numbers_are_short_and_have_no_exponent() -> None:
    assert [tables.number(value) for value in (None, 0, 0.01234, 12.345, 12345.6)] == [
        *("-", "0", "0.0123", "12.3", "12300")
    ]


def test_differences_to_another_tool_are_taken_within_rounds() -> None:
    names = (
        *("output_tokens", "requests_per_s", "output_tokens_per_s"),
        *("ttft_s", "tpot_s", "duration_s"),
    )
    ours = [dict.fromkeys(names, 1.0), dict.fromkeys(names, 4.0)]
    theirs = [dict.fromkeys(names, 2.0), dict.fromkeys(names, 4.0)]
    found = differences(ours, theirs)["ttft_s"]
    assert found["rounds"] == {"median": -0.25, "min": -0.5, "max": 0.0}
    assert found["of_medians"] == pytest.approx(2.5 / 3 - 1)
