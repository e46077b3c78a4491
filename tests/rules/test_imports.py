"""What import-linter cannot see: what importing does, and what it pulls in.

make test     or     .venv/bin/pytest tests/rules
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from functools import cache
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.rules.repository import HEAVY, OURS, ROOT, imports, modules, run_python, sources

# These are what an engine loads, or run inside one, and what is made of Gradio: heavy by nature,
# never imported at start.
LOADED_LATER = re.compile(
    r"workers\.(adapters|files|grammar|llava)\b|workers\.(hf|sglang)\.(?!(__main__|settings|engine)$)"
    r"|ui\.(api|app|pages|theme)\b"
)
TOP_LEVEL = {module.partition(".")[0] for module in modules()}


@cache
def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def closure(requirements: list[str]) -> set[str]:
    """The distributions these requirements bring, themselves included."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if f"{name}[{wanted}]" not in found:
                found.add(f"{name}[{wanted}]")
                below = metadata.requires(name) or []
                waiting.extend((Requirement(text), wanted) for text in below)
    return {entry.partition("[")[0] for entry in found}


@pytest.mark.parametrize(
    "module", ["controller.__main__", "cluster.__main__", "workers.echo.__main__"]
)
def test_needs_the_base_dependencies_only(module: str) -> None:
    project = pyproject()["project"]
    assert isinstance(project, dict)
    allowed = closure(project["dependencies"])
    foreign = [
        name
        for name, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & allowed
    ]
    code = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in foreign:
            raise ModuleNotFoundError(f"not in the base dependencies: {name}", name=name)
import importlib
foreign = set(args[0])
sys.meta_path.insert(0, Absent())
importlib.import_module(args[1])
print(json.dumps(True))
"""
    assert run_python(code, foreign, module)


def test_the_controller_loads_nothing_heavy() -> None:
    code = """
import controller.__main__, controller.app
print(json.dumps(sorted(set(args[0]) & set(sys.modules))))
"""
    assert run_python(code, HEAVY) == []


def test_importing_our_modules_does_nothing() -> None:
    names = [name for name in modules() if not LOADED_LATER.match(name)]
    assert "workers.hf.engine" in names
    assert "workers.sglang.engine" in names
    code = """
import asyncio, importlib, logging, os, signal, threading
environ, cwd, path = dict(os.environ), os.getcwd(), list(sys.path)
signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
for name in args[0]:
    importlib.import_module(name)
effects = {
    "heavy modules": sorted(set(args[1]) & set(sys.modules)),
    "threads": threading.active_count() - 1,
    "log handlers": len(logging.getLogger().handlers),
    "environment": dict(os.environ) != environ,
    "working directory": os.getcwd() != cwd,
    "sys.path": sys.path != path,
    "signal handlers": signals
    != [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
}
print(json.dumps({name: value for name, value in effects.items() if value}))
"""
    assert run_python(code, names, [name for name in HEAVY if name != "PIL"]) == {}


def test_sglang_is_the_library_and_not_our_folder() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    assert "site-packages" in spec.origin
    code = "import importlib.util; print(json.dumps(importlib.util.find_spec('sglang').origin))"
    assert run_python(code) == spec.origin


def test_nothing_installed_claims_our_names() -> None:
    claimed = metadata.packages_distributions()
    assert {name: claimed[name] for name in (*OURS, "models", "tests") if name in claimed} == {}


def test_every_package_is_known_to_the_rules() -> None:
    tool = pyproject()["tool"]
    assert isinstance(tool, dict)
    # What makes the embedded model is no part of what serves: it may import torch at once.
    assert set(tool["importlinter"]["root_packages"]) == {*TOP_LEVEL, "models"}
    assert set(tool["mypy"]["files"]) >= {*TOP_LEVEL, "models/pocket"}


def test_the_protocol_rests_on_pydantic_and_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "orjson", "protocol", "pydantic", "pydantic_core"}
    for file, tree in sources("protocol"):
        assert {name.partition(".")[0] for name in imports(tree)} <= allowed, file


@pytest.mark.parametrize("module", ["policy", "registry"])
def test_decisions_draw_no_random_numbers_of_their_own(module: str) -> None:
    """A policy takes its random source as an argument; only the type may be imported."""
    (tree,) = (tree for file, tree in sources("controller") if file.endswith(f"/{module}.py"))
    drawn = {name for name in imports(tree) if name.partition(".")[0] == "random"}
    assert drawn <= {"random", "random.Random"}
    modules_named = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "random" not in modules_named, "write: from random import Random"
