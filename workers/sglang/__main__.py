"""A worker that serves one model with SGLang, on GPUs or on a CPU.

    python -m workers.sglang                                    the embedded model, on what is there
    python -m workers.sglang --model-path llava-hf/llava-1.5-7b-hf
    python -m workers.sglang --model-path liuhaotian/llava-v1.5-7b     LLaVA's own format
    python -m workers.sglang --model-path X --tp 2              on two GPUs
    python -m workers.sglang --model-path X -- --quantization fp8    flags after -- are SGLang's own
    python -m workers.sglang --model-path X --sgl-endpoint http://127.0.0.1:30000

It starts the SGLang server as a child (``--sgl-endpoint`` uses a running one; it must serve
``--model-path``), batches continuously and reuses the prefixes of prompts and images. It registers
at ``--controller-address``; ``--no-register`` lets it serve alone. With ``--nnodes`` several
machines serve one model: the one of ``--node-rank`` 0 is the worker, the others do their parts.
"""

from __future__ import annotations

import sys

from transport.settings import parse
from workers.runner import run_worker
from workers.sglang.engine import SglangEngine
from workers.sglang.part import run_part
from workers.sglang.settings import SglangSettings


def main() -> None:
    ours, sglang_args = split(sys.argv[1:])
    settings = parse(SglangSettings, ours, sglang_args=sglang_args)
    engine = SglangEngine(settings)
    if settings.node_rank == 0:
        run_worker(settings, engine)
    run_part(settings, engine)


def split(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Our flags, and what follows ``--``."""
    if "--" not in argv:
        return argv, ()
    at = argv.index("--")
    return argv[:at], tuple(argv[at + 1 :])


if __name__ == "__main__":
    main()
