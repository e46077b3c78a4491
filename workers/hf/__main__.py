"""A worker that serves one model with Hugging Face transformers.

    python -m workers.hf                                       the embedded model, on what is there
    python -m workers.hf --model-path llava-hf/llava-1.5-7b-hf --device cuda
    python -m workers.hf --model-path /models/mine --dtype float32 --limit-model-concurrency 2

Takes any checkpoint transformers can load as a causal or a vision-language model: a directory or
a hub id (``HF_HUB_OFFLINE=1`` keeps to the local cache). It registers at ``--controller-address``;
``--no-register`` lets it serve alone. ``OMP_NUM_THREADS`` limits the threads of one computation on
a CPU. Requests decode side by side, not in one batch: many users at once are the SGLang worker's
strength, other people's checkpoints this one's.
"""

from __future__ import annotations

from transport.process import parse
from workers.hf.engine import HfEngine
from workers.hf.settings import HfSettings
from workers.runner import run_worker


def main() -> None:
    settings = parse(HfSettings)
    run_worker(settings, HfEngine(settings))


if __name__ == "__main__":
    main()
