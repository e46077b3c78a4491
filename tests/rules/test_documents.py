"""What is written about the code agrees with it.

make test     or     .venv/bin/pytest tests/rules
"""

from __future__ import annotations

import re

from protocol import errors
from tests.rules.repository import ROOT, files


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn: dict[str, tuple[str, int, str, bool]] = {}
    group = ""
    for line in (errors.__doc__ or "").splitlines():
        if leaf := re.search(
            r"^    .{3}[├└]─ (\w+) +(\d{3}) (\w+)( +\(retried elsewhere\))?$", line
        ):
            name, status, code, retried = leaf.groups()
            drawn[name] = (group, int(status), code, retried is not None)
        elif branch := re.search(r"^    [├└]─ (\w+)", line):
            group = branch[1]
    real = {
        cls.__name__: (cls.__mro__[1].__name__, cls.status, cls.code, cls.retry_elsewhere)
        for cls in errors.ERRORS.values()
    }
    assert drawn == real


def readme_tree() -> str:
    """The first ```text block of the README: one line a folder, ``controller/   what it is``."""
    block = re.search(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert block, "README.md has no ```text block"
    return block[1]


def test_the_readme_shows_every_folder_and_no_other() -> None:
    shown = set(re.findall(r"^([\w.-]+)/", readme_tree(), re.M))
    there = {file.partition("/")[0] for file in files() if "/" in file}
    assert {name for name in there if not name.startswith(".")} <= shown
    assert shown <= there


def test_the_commands_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M))
        assert named, document
        assert named <= targets, document


def test_ci_runs_what_people_run() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"
    assert commands[-2:] == ["make check", "make test"]
    assert len(commands) == 4  # and a cd to the root
