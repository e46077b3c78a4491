"""How a process ends: 0 is a clean stop."""

from __future__ import annotations

import sys
from typing import NoReturn

EXIT_USAGE = 2
"""A bad setting, or another mistake of the user."""

EXIT_START_FAILED = 3
EXIT_ENGINE_DIED = 70


def usage_error(sentence: str) -> NoReturn:
    """End the process over a mistake of its user: one sentence, exit code 2."""
    complain(sentence)
    raise SystemExit(EXIT_USAGE)


def complain(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
