"""Make Pocket LLaVA from nothing: ``python models/pocket-llava/train.py``.

The vision tower learns alone to say what is in each patch, the language model learns alone to talk;
both are cheap. Then they learn together to answer questions about pictures, and last, with more
text than pictures, to understand free phrasings. On a CPU the first two stages run side by side,
one core each, and the others on both. Every batch is a function of
the seed and the step, so that a training that was stopped goes on exactly where it was. The
adapters are trained on the finished model.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from models.pocket.architecture import empty_model, save, tokenizer, whiten
from models.pocket.learner import Learner
from models.pocket.lessons import (
    PatchTargets,
    Writer,
    photograph,
    picture_batch,
    pixel_values,
    talk_batch,
)
from models.pocket.loop import SEED, Place, Stage, kept, run
from models.pocket.scenes import random_scene
from models.pocket.styles import STYLES

PICTURE_ROW = 160  # tokens; holds a picture and about six questions
TALK_ROW = 256  # tokens
OF_VISION = ("llava.model.vision_tower", "head")  # beginnings of parameters' names
OF_LANGUAGE = ("llava.model.language_model",)
_PATCH_SHARE = 0.15  # of the patches' loss beside the answers'
_RECIPE = (
    *("facts.yaml", "elsewhere.yaml", "scenes.py", "questions.py", "talk.py", "styles.py"),
    *("architecture.py", "lessons.py", "learner.py", "loop.py", "train.py"),
)

VISION = Stage("vision", 3200, muon_lr=0.02, adam_lr=2e-3, final_lr=0.1, pictures=64)
TALK = Stage("talk", 1000, muon_lr=0.02, adam_lr=3e-3, final_lr=0.3, talks=12)
TOGETHER = Stage(
    "together", 3000, muon_lr=0.015, adam_lr=1.5e-3, final_lr=0.01, pictures=28, talks=8
)
FINISH = replace(
    TOGETHER,
    name="finish",
    steps=600,
    muon_lr=0.008,
    adam_lr=8e-4,
    pictures=10,
    talks=24,
    talk_share=0.5,
)
ADAPTERS = ("formal", "terse")
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = Stage("adapter", 450, muon_lr=0.0, adam_lr=4e-3, final_lr=0.02, pictures=10, talks=4)
_RANK = 6


def _shares(answers: dict[str, list[bool]]) -> dict[str, float]:
    return {kind: sum(right) / len(right) for kind, right in sorted(answers.items())}


def _share(answers: dict[str, list[bool]], *kinds: str) -> float:
    right = [mark for kind in kinds or answers for mark in answers.get(kind, ())]
    return sum(right) / len(right) if right else math.nan


def _bare_pictures(random: Random, number: int, device: str) -> tuple[Tensor, PatchTargets]:
    shots = [photograph(random_scene(random), random) for _ in range(number)]
    pixels = pixel_values([pixels for pixels, _ in shots]).to(device)
    return pixels, PatchTargets.of([patches for _, patches in shots], device)


def learn_to_see(learner: Learner, place: Place) -> None:
    """Train the vision tower alone."""
    pixels, _ = _bare_pictures(Random(SEED), 400, place.device)
    embeddings = learner.tower.embeddings
    whiten(embeddings.patch_embedding, embeddings.position_embedding, pixels.cpu())

    def backward(learner: Learner, random: Random) -> dict[str, float]:
        pixels, targets = _bare_pictures(random, place.share(VISION.pictures), place.device)
        with place.precision():
            features = learner.see(pixels)
        loss, right = learner.head(features, targets)
        loss.backward()
        return {"loss": loss.item(), **right}

    def judge(learner: Learner) -> dict[str, float]:
        pixels, targets = _bare_pictures(Random("judge"), 400, place.device)
        _, right = learner.head(learner.see(pixels), targets)
        return right

    run(VISION, learner, backward, judge, place, parts=OF_VISION)


def learn_to_talk(learner: Learner, write: Writer, place: Place) -> None:
    """Train the language model alone, on what needs no picture."""

    def backward(learner: Learner, random: Random) -> dict[str, float]:
        batch = talk_batch(write, random, place.share(TALK.talks), TALK_ROW, place.device)
        with place.precision():
            loss, answers = learner.read(batch, None)
        loss.backward()
        figures = {"fact": _share(answers, "fact"), "count": _share(answers, "count_to")}
        return {"loss": loss.item(), **figures, "right": _share(answers)}

    def judge(learner: Learner) -> dict[str, float]:
        return _judge_talk(learner, write, place)

    run(TALK, learner, backward, judge, place, parts=OF_LANGUAGE)


def learn_together(
    stage: Stage, learner: Learner, write: Writer, place: Place, *, parts: tuple[str, ...] = ("",)
) -> None:
    """Train on questions about pictures, with text between them so that it is not forgotten."""

    def backward(learner: Learner, random: Random) -> dict[str, float]:
        rows = place.share(stage.pictures)
        batch = picture_batch(write, random, rows, PICTURE_ROW, place.device)
        assert batch.pixels is not None
        assert batch.targets is not None
        with place.precision():
            features = learner.see(batch.pixels)
            loss, answers = learner.read(batch, features)
        patches, _ = learner.head(features, batch.targets)
        ((1 - stage.talk_share) * loss + _PATCH_SHARE * patches).backward()
        spoken = talk_batch(write, random, place.share(stage.talks), TALK_ROW, place.device)
        with place.precision():
            talk_loss, talked = learner.read(spoken, None)
        (stage.talk_share * talk_loss).backward()
        kinds = {kind: _share(answers, kind) for kind in ("color", "shape", "count", "relation")}
        shares = {"pictures": _share(answers), "talk": _share(talked)}
        return {"loss": loss.item(), **kinds, **shares}

    def judge(learner: Learner) -> dict[str, float]:
        answers: dict[str, list[bool]] = defaultdict(list)
        random = Random("judge")
        for _ in range(6):
            batch = picture_batch(
                write, random, 32, PICTURE_ROW, place.device, first_questions_only=True
            )
            assert batch.pixels is not None
            for kind, right in learner.read(batch, learner.see(batch.pixels))[1].items():
                answers[kind] += right
        return {**_shares(answers), **_judge_talk(learner, write, place)}

    run(stage, learner, backward, judge, place, parts=parts)


def _judge_talk(learner: Learner, write: Writer, place: Place) -> dict[str, float]:
    batch = talk_batch(write, Random("judge"), 40, TALK_ROW, place.device)
    return _shares(learner.read(batch, None)[1])


def learn_style(style: str, words: Any, checkpoint: Path, to: Path, place: Place) -> None:
    """Train the LoRA adapter that answers in ``style``, and save it in PEFT's format."""
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=_RANK,
            lora_alpha=4 * _RANK,
            target_modules=list(_LORA_TARGETS),
            exclude_modules=r".*vision_tower.*",  # CLIP's projections share their names
        ),
    )
    learner = Learner(model).to(place.device)
    write = Writer(words, STYLES[style])
    learn_together(replace(ADAPTER, name=style), learner, write, place, parts=("llava",))
    adapted.peft_config["default"].base_model_name_or_path = "pocket-llava"
    # Not "auto", which looks the base model up on the Hub.
    adapted.to(torch.bfloat16).save_pretrained(to / style, save_embedding_layers=False)
    (to / style / "README.md").unlink()  # PEFT's blank form


@dataclass(frozen=True, slots=True)
class Job:
    """Where to compute, with how many processes, and where the results go."""

    world: int
    device: str
    work: Path
    out: Path
    adapters: Path


def _train(rank: int, job: Job) -> None:
    """One training process."""
    if job.device == "cpu":
        torch.set_num_threads(1)  # two processes of one thread beat one process of two
    together = Place(rank, job.world, job.device, job.work)
    alone = Place(0, 1, job.device, job.work, line=rank)
    if job.world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.work / 'rendezvous'}",
            rank=rank,
            world_size=job.world,
            timeout=timedelta(days=1),  # one process may wait long for the other's stage
        )
    words = AutoTokenizer.from_pretrained(job.work / "tokenizer")
    write = Writer(words)

    def fresh() -> Learner:
        return Learner(empty_model(SEED)).to(job.device)

    # A core each, side by side; a single process does one after the other.
    if rank == 0:
        learn_to_see(fresh(), alone)
    if rank == job.world - 1:
        learn_to_talk(fresh(), write, alone)
    _meet(job)
    learner = fresh()
    for stage in (VISION, TALK):
        learner.load_state_dict(kept(stage, together)["learned"], strict=False)
    learn_together(TOGETHER, learner, write, together)
    learn_together(FINISH, learner, write, together)
    if rank == 0:
        save(learner.llava, words, job.out)
    _meet(job)
    for index, style in enumerate(ADAPTERS):
        if index % job.world == rank:
            learn_style(style, words, job.out, job.adapters, alone)
    _meet(job)
    if job.world > 1:
        dist.destroy_process_group()


def _meet(job: Job) -> None:
    """Wait for the other processes."""
    if job.world > 1:
        dist.barrier()


def _prepare(job: Job) -> None:
    """Make the work folder, or see that what is in it can be gone on with.

    Raises:
        SystemExit: the work in it is of other data, other code or another number of processes.
    """
    made_by = hashlib.sha256(f"{job.world} {job.device}".encode())
    for name in _RECIPE:
        made_by.update(Path(__file__).with_name(name).read_bytes())
    job.work.mkdir(parents=True, exist_ok=True)
    recipe = job.work / "recipe"
    if not recipe.exists():
        tokenizer().save_pretrained(job.work / "tokenizer")
        recipe.write_text(made_by.hexdigest())
    elif recipe.read_text() != made_by.hexdigest():
        sys.exit(
            f"The work in {job.work} was begun with other data, other code, or another --device or "
            "--processes. Remove that folder to begin again, or name another by --work."
        )
    (job.work / "rendezvous").unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train Pocket LLaVA and its adapters from nothing. Stopped, the same command "
        "goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    models = Path(__file__).resolve().parents[1]
    cores = len(os.sched_getaffinity(0))
    best = "cuda" if torch.cuda.is_available() else "cpu"
    for flag, folder, what in (
        ("--out", models / "pocket-llava", "folder of the checkpoint"),
        ("--adapters", models / "adapters", "folder of the adapters"),
        ("--work", models.parent / "pocket-training", "folder of the unfinished work"),
    ):
        parser.add_argument(flag, type=Path, default=folder, help=what)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), default=min(2, cores), help="on a CPU"
    )
    options = parser.parse_args(argv)
    job = Job(
        1 if options.device == "cuda" else options.processes,
        options.device,
        options.work.resolve(),
        options.out,
        options.adapters,
    )
    _prepare(job)
    try:
        if job.world == 1:
            _train(0, job)
        else:
            mp.spawn(_train, (job,), nprocs=job.world, daemon=True)
    except KeyboardInterrupt:
        sys.exit(f"Stopped; the same command goes on from {job.work}.")
    print(f"Saved to {job.out} and {job.adapters}.")
