"""The table of two tools, from rounds made by hand."""

from __future__ import annotations

import io

from rich.console import Console

from bench import cross_check
from bench.cross_check import CrossCheck, Plan, asked
from bench.processes import Harness
from bench.targets import Target


def test_what_both_tools_are_asked_differs_from_its_beginning() -> None:
    first, second = asked(0, 1, 64), asked(0, 2, 64)
    assert first == asked(0, 1, 64)
    assert first.messages[0] != second.messages[0]
    assert first.messages[-1] == second.messages[-1]


def test_both_tools_are_shown_with_what_parts_them(tmp_path: object) -> None:
    console = Console(file=io.StringIO(), width=120)
    target = Target("server", "http://a", "sglang", "m")
    check = CrossCheck(Plan(requests=2), target, Harness(tmp_path, console, ()))  # type: ignore[arg-type]
    for side, value in (("ours", 1.02), ("theirs", 1.0)):
        check._rounds[side] = [dict.fromkeys(cross_check._SAME, value)] * 3
    console.print(cross_check.table(check.results()))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+2.0 %" in said
    assert "ttft_s" in said
