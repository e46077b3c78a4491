"""One training loop for all stages: schedule, optimizers, processes, progress, resuming."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from models.pocket.learner import Learner

SEED = 1
_SAVE_EVERY_S = 60.0
_JUDGE_TIMES = 12  # in a stage


@dataclass(frozen=True, slots=True)
class Stage:
    """How long one stage is and how fast it learns; batches are those of all processes together."""

    name: str
    steps: int
    muon_lr: float
    adam_lr: float
    final_lr: float  # share of the learning rate that is left at the end
    pictures: int = 0  # bare, or rows of questions in the last stage
    talks: int = 0  # rows
    talk_share: float = 0.25  # of the loss, where there are both


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the training processes this is, where it computes and where it keeps its work."""

    rank: int
    world: int
    device: str
    work: Path
    line: int = 0  # of the terminal, for the progress bar

    def share(self, number: int) -> int:
        """This process's part of a batch of ``number``."""
        return max(1, number // self.world)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16)


class Progress:
    """A bar with what has been learned so far, and a line of JSON per judgement in a log."""

    def __init__(self, stage: Stage, step: int, place: Place) -> None:
        self._bar = tqdm(
            total=stage.steps,
            initial=step,
            desc=f"{stage.name:9}",
            position=place.line,
            disable=place.rank > 0,
            dynamic_ncols=True,
            mininterval=1,
        )
        self._log = place.work / "log.jsonl"
        self._recent: dict[str, float] = {}

    def step(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            if not math.isnan(value):
                self._recent[name] = 0.95 * self._recent.get(name, value) + 0.05 * value
        self._bar.set_postfix({k: f"{v:.2f}" for k, v in self._recent.items()}, refresh=False)
        self._bar.update()

    def judged(self, stage: str, step: int, figures: dict[str, float]) -> None:
        entry = {"stage": stage, "step": step, "unix_time_s": time.time(), **figures}
        with self._log.open("a") as log:
            log.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._bar.close()


def _optimizers(parameters: dict[str, nn.Parameter], stage: Stage) -> list[Any]:
    """Muon for the matrices inside, AdamW for the rest."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    small: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        if parameter.ndim == 2 and not any(part in name for part in ("embed", "head", "lora")):
            inner.append(parameter)
        else:
            (outer if parameter.ndim >= 2 else small).append(parameter)
    optimizers: list[Any] = [
        torch.optim.AdamW(
            [{"params": outer, "weight_decay": 0.02}, {"params": small, "weight_decay": 0.0}],
            lr=stage.adam_lr,
            betas=(0.9, 0.98),
        ),
    ]
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=stage.muon_lr, weight_decay=0.01))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["first_lr"] = group["lr"]
    return optimizers


def _set_learning_rate(optimizers: list[Any], stage: Stage, step: int) -> None:
    """A short climb, then half a cosine down to ``final_lr``."""
    climb = max(1, stage.steps // 33)
    if step < climb:
        share = (step + 1) / climb
    else:
        along = (step - climb) / max(1, stage.steps - climb)
        share = stage.final_lr + (1 - stage.final_lr) * 0.5 * (1 + math.cos(math.pi * along))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["first_lr"] * share


def _average(gradients: list[Tensor]) -> None:
    """Make every process's gradients the mean of all."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


Backward = Callable[[Learner, Random], dict[str, float]]  # adds gradients, returns figures
Judge = Callable[[Learner], dict[str, float]]


def run(
    stage: Stage,
    learner: Learner,
    backward: Backward,
    judge: Judge,
    place: Place,
    *,
    parts: tuple[str, ...],
) -> None:
    """Train ``learner`` for one stage, from where the last run of it stopped.

    Args:
        backward: computes one batch and adds its gradients; the random source is the batch.
        judge: what has been learned, on data that is always the same.
        parts: beginnings of the names of the parameters that learn.
    """
    learning = {
        name: parameter
        for name, parameter in learner.named_parameters()
        # CLIP's last norm is behind the features that LLaVA takes.
        if parameter.requires_grad and name.startswith(parts) and "post_layernorm" not in name
    }
    optimizers = _optimizers(learning, stage)
    step = 0
    if _path(stage, place).exists():
        state = kept(stage, place)
        learner.load_state_dict(state["learned"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    first = place.rank == 0
    progress = Progress(stage, step, place)
    saved_at = time.monotonic()
    learner.train()
    # torch interrupts the processes of a parent that dies, but one that was started in the
    # background of a shell ignores interrupts.
    parent = multiprocessing.parent_process()
    while step < stage.steps:
        if parent is not None and not parent.is_alive():
            sys.exit("The training was killed.")
        _set_learning_rate(optimizers, stage, step)
        random = Random(f"{SEED} {stage.name} {step} {place.rank}")
        figures = backward(learner, random)
        if place.world > 1:
            _average([p.grad for p in learning.values() if p.grad is not None])
        nn.utils.clip_grad_norm_(learning.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        learner.zero_grad()
        step += 1
        progress.step(figures)
        if first and (step % max(1, stage.steps // _JUDGE_TIMES) == 0 or step == stage.steps):
            learner.eval()
            with torch.no_grad(), place.precision():
                progress.judged(stage.name, step, judge(learner))
            learner.train()
        if first and (time.monotonic() - saved_at > _SAVE_EVERY_S or step == stage.steps):
            _keep(stage, place, learning, optimizers, step)
            saved_at = time.monotonic()
    progress.close()


def _path(stage: Stage, place: Place) -> Path:
    return place.work / f"{stage.name}.pt"


def kept(stage: Stage, place: Place) -> dict[str, Any]:
    """What a stage has kept: its ``step``, the parameters ``learned``, and its ``optimizers``.

    Raises:
        FileNotFoundError: it has kept nothing yet.
    """
    state: dict[str, Any] = torch.load(_path(stage, place), map_location=place.device)
    return state


def _keep(
    stage: Stage,
    place: Place,
    learned: dict[str, nn.Parameter],
    optimizers: list[Any],
    step: int,
) -> None:
    state = {
        "learned": {name: parameter.detach() for name, parameter in learned.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    part = _path(stage, place).with_suffix(".part")
    torch.save(state, part)
    part.replace(_path(stage, place))
