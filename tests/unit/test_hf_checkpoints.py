"""Checkpoints of many architectures are loaded from their files, and answer in a batch as alone.

pytest tests/unit/test_hf_checkpoints.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from protocol.events import Finished
from tests.checkpoints import MAKERS, make
from tests.hf import asked, job_of, running
from tests.pictures import encoded, picture
from workers.hf.batch import Batch
from workers.hf.loading import load
from workers.hf.scheduler import Deliver, Scheduler
from workers.hf.settings import HfSettings
from workers.hf.threads import Threads
from workers.hf.warmup import warm_up

pytestmark = pytest.mark.timeout(120)

SQUARE = encoded(picture())
WIDE = encoded(Image.effect_noise((180, 60), 80).convert("RGB"))
SLIDING = {"gemma2"}


@pytest.mark.parametrize("name", MAKERS)
def test_answers_in_a_batch_are_those_alone(name: str, tmp_path: Path) -> None:
    path = make(name, tmp_path)
    model = load(HfSettings(model_path=path, dtype="float32", device="cpu"), lambda _: None)
    warm = warm_up(model, batching=True)
    assert (warm.unbatched is None) == (name not in SLIDING), warm.unbatched
    sees = model.image_token is not None
    assert sees == ("vl" in name or "llava" in name)
    assert (warm.image_tokens > 0) == sees
    requests = [asked("Count to ten."), asked("Why? " * 30, temperature=1.2, seed=3)]
    if sees:
        requests += [asked("What is it?", SQUARE), asked("And these? " * 9, WIDE, SQUARE)]

    def batched(deliver: Deliver) -> Any:
        batch = Batch(model, chunk_tokens=16)
        return Scheduler(batch, prefill_tokens=16, deliver=deliver)

    def threads(deliver: Deliver) -> Any:
        return Threads(1, deliver=deliver)

    found: list[list[list[int]]] = []
    for start in (threads,) if warm.unbatched else (threads, batched):
        with running(start) as (runner, answers):
            jobs = [job_of(model, request) for request in requests]
            for job in jobs:
                runner.submit(job)
            for job in jobs:
                assert isinstance(answers.end(job), Finished), answers.items[job]
            found.append([job.ids for job in jobs])
    assert all(ids == found[0] for ids in found)
    assert len({tuple(ids) for ids in found[0]}) == len(requests)
