"""What no file may hold, and what tests may not do.

make test     or     .venv/bin/pytest tests/rules
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.rules.repository import ROOT, files, imports, sources

# Put together here, so that this file does not hold them.
NOT_OURS_TO_NAME = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "download.pytorch" + ".org",
    "/wo" + "rk/",
]
POLL_S = 0.1
"""A loop that waits for a condition may sleep this long between two looks."""


@pytest.mark.parametrize("text", NOT_OURS_TO_NAME)
def test_no_file_names_a_registry_or_a_path_of_one_machine(text: str) -> None:
    assert [file for file in files() if text.encode() in (ROOT / file).read_bytes()] == []


def test_unit_tests_use_fakes_made_by_hand() -> None:
    for file, tree in sources("tests/unit"):
        assert not {name for name in imports(tree) if "mock" in name.split(".")}, file


def _sleeps(node: ast.AST, *, looping: bool = False) -> Iterator[tuple[int, float, bool]]:
    """Line, literal seconds and whether a ``while`` or ``for`` is around it, of every sleep."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
            called = child.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            value = child.args[0].value
            if name == "sleep" and isinstance(value, int | float):
                yield child.lineno, value, looping
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        loop = isinstance(child, ast.While | ast.For | ast.AsyncFor)
        yield from _sleeps(child, looping=loop or (looping and not function))


def test_tests_wait_for_facts_and_not_for_time() -> None:
    """A sleep that is the point of its test says so on its line: ``# sleep: why``."""
    found = []
    for file, tree in sources("tests"):
        lines = (ROOT / file).read_text().splitlines()
        found += [
            f"{file}:{line}"
            for line, seconds, looping in _sleeps(tree)
            if seconds > 0
            and not (looping and seconds <= POLL_S)
            and "# sleep:" not in lines[line - 1]
        ]
    assert found == []
