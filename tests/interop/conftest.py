"""Processes of ours and of theirs, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.others import HOME
from tests.processes import running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (HOME / ".ready").exists():
        return
    skip = pytest.mark.skip(reason="there is no .venv-fastchat; `make test` makes it")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def controller(folder: Path) -> Iterator[str]:
    """The address of a controller of ours."""
    args = ("--port", "0", "--dispatch-method", "lottery")
    with running(folder, "controller", *args) as process:
        yield process.wait_ready()
