"""The file of results: one JSON object whose ``schema`` says how to read it.

``tandem.bench/1``: ``kind`` is compare, overhead or cross_check. Of a comparison, ``targets`` holds
facts by name, ``parity`` the answers to the fixed questions, and ``cells`` what was measured: a
workload under one load with one target, its rounds one by one and their summary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.processes import ROOT
from bench.results import rounded

SCHEMA = "tandem.bench/1"
_DIGITS = 5


class FileError(Exception):
    """A file of results cannot be read; the text is a sentence."""


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write ``found``, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    text = json.dumps(rounded(dict(found), _DIGITS), separators=(",", ":"))
    half.write_text(text.replace(f"{ROOT}/", "") + "\n")  # where a checkout lies is its own affair
    os.replace(half, path)


def read(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        FileError: there are none, or of a schema we do not know.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise FileError(f"{path} cannot be read: {exc}.") from exc
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise FileError(f"{path} has the schema {schema!r}; this reads {SCHEMA!r}.")
    return dict(found)
