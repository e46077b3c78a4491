"""The first passes of a loaded network: is it sound, and may its answers share a batch?

transformers promises that a network takes a padding mask and a cache of ours, not that it gives
the same numbers with them. So it is tried, once, before anybody depends on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from protocol.errors import EngineFailed, TandemError
from protocol.messages import IMAGE_PLACEHOLDER, GenerateRequest
from workers.answer import Answer
from workers.files import one_line
from workers.hf import failures
from workers.hf.batch import Batch, Result
from workers.hf.job import Job, advance, lengthened, on_device, prepare
from workers.hf.model import HfModel, Inputs
from workers.images import Picture
from workers.text import TextStream

_TOKENS = 3  # a job of the trial makes
_CHUNK_TOKENS = 16  # small, so that prompts come in pieces
_TIMED_TOKENS = 128
_PREFILL_S = 0.1
"""Between two steps, for what is more than one piece of a prompt."""


@dataclass(frozen=True, slots=True)
class Warm:
    """What the first passes have shown."""

    image_tokens: int  # a picture takes, for estimates; 0 for a model that takes none
    prefill_tokens: int  # of prompts that hold up those who decode for ``_PREFILL_S``
    unbatched: str | None  # why answers do not share a batch; None: they can


def warm_up(model: HfModel, *, batching: bool) -> Warm:
    """Compute two answers, one on a picture if the model sees; alone, before anything else runs.

    Some weights are repacked within the first pass, which is not safe in two threads.

    Raises:
        EngineFailed: the model loads but cannot answer.
    """
    try:
        seeing, plain = _job(model, sees=model.image_token is not None), _job(model, sees=False)
        seen = seeing.inputs["input_ids"]
        with torch.inference_mode():
            _reference(seeing, seeing.inputs)
            unbatched: str | None = "--batching is off"
            prefill_tokens = 0
            if batching:
                prefill_tokens = _prefill_tokens(model, plain)
                unbatched = _why_unbatched(model, [seeing, plain])
    except TandemError as exc:
        raise EngineFailed(f"The model loads but cannot answer: {exc.message}") from exc
    except Exception as exc:
        error = failures.as_typed(exc)
        words = one_line(exc)
        raise EngineFailed(
            f"The model loads but cannot answer: {error.message} {words}",
            remedy="Give it another --dtype or --device, or another checkpoint.",
        ) from exc
    image_tokens = 0
    if model.image_token_id is not None:
        image_tokens = int((seen == model.image_token_id).sum())
    return Warm(image_tokens, prefill_tokens, unbatched)


def _job(model: HfModel, *, sees: bool) -> Job:
    pictures = [Picture(Image.new("RGB", (336, 336), "gray"))] if sees else []
    text = f"{IMAGE_PLACEHOLDER * len(pictures)}\nHello" + " to all of you" * (8 if sees else 1)
    asked: dict[str, Any] = {"prompt": text}
    if model.apply_template is not None:
        asked = {"messages": [{"role": "user", "content": text}]}
    request = GenerateRequest(
        model="warm-up", images=("gray",) * len(pictures), temperature=0, **asked
    )
    job = prepare(model, request, pictures, threading.Event())
    job.answer = Answer(TextStream(model.decode, ()), eos_ids=frozenset(), max_tokens=_TOKENS)
    return job


def _why_unbatched(model: HfModel, jobs: Sequence[Job]) -> str | None:
    cache = DynamicCache(config=model.network.config.get_text_config())
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return "its layers keep something else than the keys and values of all tokens"
    try:
        difference = _difference(model, jobs)
    except Exception as exc:  # noqa: BLE001 - any model may come here, and raise anything
        return f"it failed in a batch: {one_line(exc)}"
    # Precision rounds; a wrong mask or position changes the scores as a whole.
    if not difference < (0.001 if model.exact else 0.1):  # right ones: 1e-6, 0.015
        return f"its scores in a batch differ by {difference:.2g} from those alone"
    return None


def _difference(model: HfModel, jobs: Sequence[Job]) -> float:
    """How far the scores of a batch are from those of the bare network, relative; the largest."""
    seen: dict[Job, list[torch.Tensor]] = {job: [] for job in jobs}
    prompts = {job: job.inputs for job in jobs}  # a batch lets go of them

    def choose(jobs: Sequence[Job], scores: torch.Tensor) -> list[Result]:
        for job, row in zip(jobs, scores, strict=True):
            seen[job].append(row.clone())
        return advance(jobs, scores)

    batch = Batch(model, chunk_tokens=_CHUNK_TOKENS, choose=choose)
    for job in jobs:
        batch.begin(job)
        while batch.filling:
            _, result = batch.fill()
            if isinstance(result, Exception):
                raise result
        batch.step()
    while len(batch):
        batch.step()
    worst = 0.0
    for job in jobs:
        alone = _reference(job, prompts[job])
        together = torch.stack(seen[job])
        # What all tokens have in common chooses none of them.
        spread = alone - alone.mean(dim=-1, keepdim=True)
        worst = max(worst, float((together - alone).norm() / spread.norm()))
    return worst


def _reference(job: Job, prompt: Inputs) -> torch.Tensor:
    """The scores [tokens, vocabulary] of what the job has answered, and of its next token, in
    one pass of the bare network."""
    inputs = lengthened(prompt, job.ids[:-1])
    network = job.model.network
    with job.model.adapters.rows([job.adapter]):
        logits = network(**on_device(inputs, network), use_cache=False).logits
    return logits[0, -max(len(job.ids), 1) :].float()


def _prefill_tokens(model: HfModel, job: Job) -> int:
    """How many tokens of prompts take ``_PREFILL_S``, by the clock."""
    ids = job.inputs["input_ids"]
    length = min(_TIMED_TOKENS, model.context_length)
    inputs = {"input_ids": ids.repeat(1, -(-length // ids.shape[1]))[:, :length]}
    taken_s = []
    for _ in range(4):
        begun_s = time.perf_counter()
        with model.adapters.rows([None]):
            float(model.network(**on_device(inputs, model.network)).logits[0, -1, 0])
        taken_s.append(time.perf_counter() - begun_s)
        if taken_s[-1] > _PREFILL_S:  # a piece at a time then, however exact this is
            break
    return max(1, int(length * _PREFILL_S / min(taken_s)))
