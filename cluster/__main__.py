"""Run a whole Tandem cluster on this machine.

  python -m cluster up                 the demo: a controller, one SGLang and one Hugging Face
                                       worker on the embedded model, on a GPU if there is one
  python -m cluster up cluster.yaml    the controller and workers that the file describes
  python -m cluster example            print such a file, explained
  python -m cluster status [--json]    what runs, from any terminal
  python -m cluster down               stop it, from any terminal

`up` stays in the foreground: it starts the controller, then the workers, shows how far each has
loaded, prints what is where, and starts again whatever crashes, saying why. Ctrl-C (or SIGTERM)
lets running requests finish and stops everything within 10 seconds; a second Ctrl-C at once.

Logs are in run/logs/NAME.log. Several clusters need several run directories: --run-dir.

Exit codes: 0 stopped as asked; 1 status: not (wholly) ready; 2 a mistake in the settings, a port
that is taken, or a cluster that runs already; 3 nothing could be started.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import commands
from cluster.config import EXAMPLE, ConfigError
from cluster.view import make_console
from transport.exits import EXIT_USAGE


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m cluster", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--run-dir",
        type=Path,
        default=commands.DEFAULT_RUN_DIR,
        metavar="DIR",
        help="where the cluster's state and logs are (default: run/ in the checkout)",
    )
    commands_ = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands_.add_parser(
        "up",
        parents=[shared],
        help="start a cluster and look after it",
        description=__doc__,
        formatter_class=raw,
        allow_abbrev=False,
    )
    up.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="cluster.yaml",
        help="the cluster to start; without it, the demo",
    )
    up.add_argument("--log-json", action="store_true", help="the logs are one JSON object a line")
    status = commands_.add_parser(
        "status", parents=[shared], help="show what runs", allow_abbrev=False
    )
    status.add_argument("--json", action="store_true", help="for programs")
    commands_.add_parser("down", parents=[shared], help="stop it", allow_abbrev=False)
    commands_.add_parser("example", help="print a cluster file, explained", allow_abbrev=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.command == "up":
            return commands.up(args.file, args.run_dir, log_json=args.log_json)
        if args.command == "status":
            return commands.status(args.run_dir, as_json=args.json)
        if args.command == "down":
            return commands.down(args.run_dir)
        sys.stdout.write(EXAMPLE)
    except ConfigError as exc:
        make_console(stderr=True).print(f"error: {exc}", soft_wrap=True)
        return EXIT_USAGE
    except KeyboardInterrupt:  # before `up` listens to signals, or in the other commands
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
