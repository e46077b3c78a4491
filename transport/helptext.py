"""``--help`` for people: what a flag takes in a word, and only the defaults that say something."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any

_WORDS = {"str": "TEXT", "SecretStr": "TEXT", "int": "N", "float": "NUMBER", "Path": "PATH"}
_SEVERAL = re.compile(r"tuple\[(\w+),\.\.\.\]")
_SAYS_NOTHING = re.compile(r" \(default: (None|False|True|\(\)|)\)| \(default factory: \w+\)")
_OF_SEVERAL = re.compile(r"\(default: \((.+?),?\)\)")
_WHOLE = re.compile(r"(\(default: \d+)\.0\)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Puts words in the place of Python's types and values."""

    def add_usage(self, usage: Any, actions: Iterable[Any], *args: Any, **how: Any) -> None:
        actions = list(actions)
        for action in actions:
            _reword(action)
        super().add_usage(usage, actions, *args, **how)

    def add_argument(self, action: argparse.Action) -> None:
        _reword(action)
        super().add_argument(action)


def _reword(action: argparse.Action) -> None:
    if isinstance(action.metavar, str):
        name = _SEVERAL.sub(r"\1", action.metavar)
        action.metavar = _WORDS.get(name, name)
    if action.help and action.help != argparse.SUPPRESS:
        told = _SAYS_NOTHING.sub("", action.help)
        told = _OF_SEVERAL.sub(
            lambda found: "(default: {})".format(found[1].replace("'", "")), told
        )
        action.help = _WHOLE.sub(r"\1)", told)
