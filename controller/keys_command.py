"""``python -m controller keys``: make, list and remove API keys.

  python -m controller keys add NAME       make a key and print it, once; only its digest is kept
  python -m controller keys list           who has one, and what each may do
  python -m controller keys remove NAME    it is refused from now on

The file is --api-key-file, else TANDEM_API_KEY_FILE, else tandem-keys.json in this folder. A
controller that was started with `--api-key-file FILE` notices a change within two seconds.
Exit codes: 0 done, 2 a mistake.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from controller import keys
from controller.keys import DEFAULT_FILE, KeyFile, KeyFileError
from transport.exits import EXIT_USAGE

FILE_VARIABLE = "TANDEM_API_KEY_FILE"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m controller keys", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--api-key-file",
        type=Path,
        default=Path(os.environ.get(FILE_VARIABLE) or DEFAULT_FILE),
        metavar="FILE",
        help=f"the key file (default: {FILE_VARIABLE}, else {DEFAULT_FILE})",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser(
        "add", parents=[shared], help="make a key and print it, once", allow_abbrev=False
    )
    add.add_argument("name", metavar="NAME", help="whose it is; it appears in the log")
    add.add_argument(
        "--requests-per-minute", type=int, metavar="N", help="most requests (default: no limit)"
    )
    add.add_argument(
        "--tokens-per-minute",
        type=int,
        metavar="N",
        help="most tokens, of prompts and answers together (default: no limit)",
    )
    add.add_argument(
        "--models",
        default="",
        metavar="A,B",
        help="models it may use, each with all its adapters, or MODEL:ADAPTER (default: all)",
    )
    commands.add_parser("list", parents=[shared], help="show who has one", allow_abbrev=False)
    remove = commands.add_parser(
        "remove", parents=[shared], help="refuse a key from now on", allow_abbrev=False
    )
    remove.add_argument("name", metavar="NAME")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    args = parse_args(argv)
    path: Path = args.api_key_file
    try:
        if args.command == "add":
            _add(path, args)
        elif args.command == "remove":
            _remove(path, args.name)
        else:
            sys.stdout.write(_table(keys.load(path)))
    except KeyFileError as exc:
        _say(f"error: {exc}")
        return EXIT_USAGE
    if (complaint := keys.exposed(path)) is not None:
        _say(f"warning: {complaint}")
    return 0


def _add(path: Path, args: argparse.Namespace) -> None:
    key, entry = keys.mint(
        args.name,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        models=tuple(name.strip() for name in args.models.split(",")) if args.models else (),
    )
    with keys.alone(path):
        file = keys.load(path) if path.exists() else KeyFile()
        if file.named(args.name) is not None:
            raise KeyFileError(
                f"{path} has a key named {args.name} already; remove it, or take another name."
            )
        keys.save(path, KeyFile(keys=(*file.keys, entry)))
    _say(f"{args.name} is in {path}. This is the only time that the key is shown:")
    sys.stdout.write(f"{key}\n")


def _remove(path: Path, name: str) -> None:
    with keys.alone(path):
        file = keys.load(path)
        if file.named(name) is None:
            known = ", ".join(key.name for key in file.keys) or "none"
            raise KeyFileError(f"{path} has no key named {name}; there are: {known}.")
        keys.save(path, KeyFile(keys=tuple(key for key in file.keys if key.name != name)))
    _say(f"{name} is no longer in {path}.")


def _table(file: KeyFile) -> str:
    rows: list[tuple[str, ...]] = [("name", "requests/min", "tokens/min", "models", "created")]
    for key in file.keys:
        limits = (key.requests_per_minute, key.tokens_per_minute)
        shown = ("no limit" if limit is None else str(limit) for limit in limits)
        created = key.created.strftime("%Y-%m-%d %H:%M")
        rows.append((key.name, *shown, ",".join(key.models) or "all", created))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _say(sentence: str) -> None:
    """To the terminal; standard output is for the key alone, so that it can be piped on."""
    sys.stderr.write(f"{sentence}\n")
