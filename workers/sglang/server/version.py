"""Which SGLang: the versions Tandem is tested with, and what to say about others.

This folder is all that knows SGLang's insides, so a new version is adopted here; CONTRIBUTING.md
says how. Imports nothing of SGLang: the worker asks before it starts the server.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from collections.abc import Iterable
from importlib import metadata

from protocol.errors import EngineFailed, ServingError

log = logging.getLogger(__name__)

OLDEST = "0.5.18"
"""With this one and with ``PINNED`` the contract suite passes: ``make test-sglang-versions``."""

PINNED = "0.5.23"
"""The one in ``pyproject.toml``."""

REMEDY = f"Install the version that Tandem is made for: pip install 'sglang=={PINNED}'"


def installed() -> str | None:
    """The version that is installed, if one is."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def compare(version: str) -> int:
    """-1: older than what Tandem is tested with, 0: within, 1: newer, or not to be told."""
    release = _release(version)
    if not release or release > _release(PINNED):
        return 1
    return -1 if release < _release(OLDEST) else 0


def check(version: str | None) -> None:
    """Warn of an SGLang that Tandem is not tested with.

    Raises:
        EngineFailed: there is none, or it is too old; what to install is said.
    """
    if version is None:
        raise EngineFailed(
            "SGLang is not installed.",
            remedy="Install Tandem's extra sglang, or use --sgl-endpoint or the HF worker.",
        )
    if compare(version) < 0:
        raise EngineFailed(
            f"SGLang {version} is installed, and Tandem needs {OLDEST} or newer.", remedy=REMEDY
        )
    if warning := doubt(version):
        log.warning(warning)


def doubt(version: str) -> str | None:
    """What to say of a server of this version, if Tandem is not tested with it."""
    side = compare(version)
    if side == 0:
        return None
    return (
        f"SGLang {version} is {'older' if side < 0 else 'newer'} than the versions that Tandem is "
        f"tested with, {OLDEST} to {PINNED}. {REMEDY}"
    )


def explain(failure: ServingError, version: str | None) -> ServingError:
    """``failure`` of a start; of a version that Tandem is not tested with, that is the suspect."""
    if version is None or compare(version) == 0 or not isinstance(failure, EngineFailed):
        return failure
    return EngineFailed(failure.message, remedy=f"It may be the version. {doubt(version)}")


def import_all(packages: Iterable[str]) -> None:
    """Import the modules of ``packages``, raising what is wrong with them.

    SGLang skips one that cannot be imported, with a line in its log, and then serves the
    checkpoint in another way: without our model classes, without cache hits on pictures.
    """
    for name in packages:
        package = importlib.import_module(name)
        for module in pkgutil.iter_modules(package.__path__, f"{name}."):
            importlib.import_module(module.name)


def _release(version: str) -> tuple[int, ...]:
    """(0, 5, 15) of "0.5.15.post1" and "0.5.15rc1"; empty if there is no such beginning."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()
