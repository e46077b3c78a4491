"""The repository as the rules see it: its files, its packages and their imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = ("bench", "cluster", "controller", "protocol", "transport", "ui", "workers")
HEAVY = ("PIL", "numpy", "peft", "sgl_kernel", "sglang", "torch", "transformers", "triton")


@cache
def files() -> tuple[str, ...]:
    """Every file that is, or may become, part of the repository, relative to its root."""
    command = "git -c safe.directory=* ls-files -z --cached --others --exclude-standard"
    listed = subprocess.run(
        command.split(), cwd=ROOT, check=True, capture_output=True, text=True, timeout=10
    )
    return tuple(sorted(f for f in set(listed.stdout.split("\0")) if f and (ROOT / f).is_file()))


def sources(folder: str) -> Iterator[tuple[str, ast.Module]]:
    """Every Python file under a folder, parsed."""
    for file in files():
        if file.startswith(f"{folder}/") and file.endswith(".py"):
            yield file, ast.parse((ROOT / file).read_text(), file)


def modules() -> list[str]:
    """Every module of our packages by its dotted name."""
    return [
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for package in OURS
        for file, _ in sources(package)
    ]


def imports(tree: ast.AST) -> set[str]:
    """Every module imported in a tree, at the top or within a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def run_python(code: str, *arguments: object) -> Any:
    """What ``code`` prints as JSON, run by a fresh interpreter in the root of the repository.

    ``arguments`` are what the code finds in ``args``.
    """
    prelude = "import json, sys; args = json.loads(sys.argv[1])\n"
    command = [sys.executable, "-c", prelude + code, json.dumps(arguments)]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=18)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
