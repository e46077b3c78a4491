"""A worker that serves one model with Hugging Face transformers.

    python -m workers.hf                                       the embedded model, on what is there
    python -m workers.hf --load-4bit                           its language model in 4 bits
    python -m workers.hf --model-path llava-hf/llava-1.5-7b-hf --device cuda
    python -m workers.hf --model-path liuhaotian/llava-v1.5-7b     LLaVA's own format
    python -m workers.hf --model-path my-lora --model-base llava-hf/llava-1.5-7b-hf
    python -m workers.hf --adapter formal=models/adapters/formal   chosen by each request

Takes any checkpoint transformers can load as a causal or a vision-language model, and LLaVA's: a
directory or a hub id (``HF_HUB_OFFLINE=1`` keeps to the local cache). It registers at
``--controller-address``; ``--no-register`` lets it serve alone. ``OMP_NUM_THREADS`` limits the
threads of one computation on a CPU. Requests decode together; docs/hf-worker.md tells the rest.
"""

from __future__ import annotations

from transport.settings import parse
from workers.hf.engine import HfEngine
from workers.hf.settings import HfSettings
from workers.runner import run_worker


def main() -> None:
    settings = parse(HfSettings)
    run_worker(settings, HfEngine(settings))


if __name__ == "__main__":
    main()
