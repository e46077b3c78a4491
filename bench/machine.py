"""Where and with what was measured, for whoever reads the file later."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import sys
from contextlib import suppress
from typing import Any

import psutil

from bench.files import SCHEMA
from bench.results import commit, machine
from bench.usage import Gpus, without_secrets

_PACKAGES = ("aiohttp", "numpy", "uvloop", "torch", "transformers", "sglang")


def facts(gpus: Gpus) -> dict[str, Any]:
    """The hardware, the system and the versions of this environment."""
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        **machine(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "gpus": gpus.names(),
        "versions": versions,
    }


def head(kind: str, argv: list[str]) -> dict[str, Any]:
    """The first lines of a file of results."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", kind, *without_secrets(argv)]),
        "commit": commit(),
        "python": sys.version.split()[0],
    }
