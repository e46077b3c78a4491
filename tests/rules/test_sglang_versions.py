"""The SGLang versions are the same wherever they are written.

make test     or     .venv/bin/pytest tests/rules
"""

from __future__ import annotations

import re
import tomllib

from tests.rules.repository import ROOT
from workers.sglang.server.version import OLDEST, PINNED


def test_the_pinned_one_is_the_one_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["sglang"] == [f"sglang=={PINNED}"]


def test_the_oldest_one_is_the_one_that_is_tested() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^OTHER_SGLANG := (.*)$", makefile, re.MULTILINE)[1] == OLDEST  # type: ignore[index]
    assert f"\nsglang=={OLDEST}\n" in (ROOT / f"requirements/sglang-{OLDEST}.txt").read_text()


def test_ci_does_not_run_both() -> None:
    assert "versions" not in (ROOT / ".ci" / "run").read_text()
