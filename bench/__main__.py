"""Which backend, which settings, how many at once, what does the controller cost, is it the same?

    python -m bench compare                                a cluster of its own, <= 5 minutes
    python -m bench compare --targets a=http://127.0.0.1:21001#llava b=http://127.0.0.1:30000
    python -m bench overhead                               what the controller adds
    python -m bench cross-check                            our figures beside SGLang's own tool's
    python -m bench plot FILES...                          pictures of files of results

`python -m bench COMMAND --help` says more; docs/benchmark.md says how to read what comes out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from bench import commands

COMMANDS: Mapping[
    str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
] = {
    "compare": (commands.compare_flags, commands.compare),
    "overhead": (commands.overhead_flags, commands.overhead),
    "cross-check": (commands.cross_check_flags, commands.cross_check),
    "plot": (commands.plot_flags, commands.plot),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    below = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_flags, act) in COMMANDS.items():
        one = below.add_parser(
            name,
            description=act.__doc__,
            help=(act.__doc__ or "").partition("\n")[0],
            formatter_class=raw,
            allow_abbrev=False,
        )
        add_flags(one)
        one.set_defaults(act=act, parser=one)
    args = parser.parse_args(argv)
    args.argv = list(argv[1:])
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    code: int = args.act(args)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
