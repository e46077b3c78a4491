"""A worker that serves one model with SGLang, on GPUs or on a CPU.

    python -m workers.sglang                                    the embedded model, on what is there
    python -m workers.sglang --model-path llava-hf/llava-1.5-7b-hf
    python -m workers.sglang --model-path X -- --tp-size 2      flags after -- are SGLang's own
    python -m workers.sglang --model-path X --sgl-endpoint http://127.0.0.1:30000

It starts the SGLang server as a child (``--sgl-endpoint`` uses a running one; it must serve
``--model-path``), batches continuously and reuses the prefixes of prompts and images. It registers
at ``--controller-address``; ``--no-register`` lets it serve alone.
"""

from __future__ import annotations

import sys

from transport.process import parse
from workers.runner import run_worker
from workers.sglang.engine import SglangEngine
from workers.sglang.settings import SglangSettings


def main() -> None:
    ours, sglang_args = split(sys.argv[1:])
    settings = parse(SglangSettings, ours, sglang_args=sglang_args)
    run_worker(settings, SglangEngine(settings))


def split(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Our flags, and what follows ``--``."""
    if "--" not in argv:
        return argv, ()
    at = argv.index("--")
    return argv[:at], tuple(argv[at + 1 :])


if __name__ == "__main__":
    main()
