"""Make Pocket LLaVA from nothing: ``python models/pocket-llava/train.py``.

Three stages. The vision tower learns alone to say what is in each patch, the language model learns
alone to talk; both are cheap. Then they learn together to answer questions about pictures. On a CPU
the first two run side by side, one core each, and the third on both. Every batch is a function of
the seed and the step, so that a training that was stopped goes on exactly where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from models.pocket.architecture import IMAGE, empty_model, save, tokenizer, whiten
from models.pocket.lessons import (
    Batch,
    PatchTargets,
    Writer,
    photograph,
    picture_batch,
    pixel_values,
    talk_batch,
)
from models.pocket.scenes import BACKGROUNDS, COLORS, SHAPES, random_scene
from models.pocket.styles import STYLES

SEED = 1
STAGES = ("vision", "talk", "together", "save", "adapters")
PICTURE_ROW = 160  # tokens; holds a picture and about eight questions
TALK_ROW = 256  # tokens
_PATCH_SHARE = 0.15  # of the patches' loss beside the answers'
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


VISION = Stage("vision", 3200, muon_lr=0.02, adam_lr=2e-3, final_lr=0.1, pictures=64)
TALK = Stage("talk", 1000, muon_lr=0.02, adam_lr=3e-3, final_lr=0.3, talks=12)
TOGETHER = Stage(
    "together", 3600, muon_lr=0.015, adam_lr=1.5e-3, final_lr=0.01, pictures=28, talks=8
)
ADAPTERS = ("formal", "terse")
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = Stage("adapter", 400, muon_lr=0.0, adam_lr=4e-3, final_lr=0.02, pictures=10, talks=2)


class PatchHead(nn.Module):
    """Says what each patch holds; guides the vision tower and is thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = [2, len(COLORS) + 1, len(SHAPES) + 1, 3]
        self.patch = nn.Linear(width, sum(self.sizes))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, features: Tensor, targets: PatchTargets) -> tuple[Tensor, dict[str, float]]:
        """The loss, and the shares of things whose color, shape and place are told right.

        Args:
            features: of shape (pictures, IMAGE_TOKENS, width).
        """
        features = self.norm(features.float())
        background = self.background(features.mean(1))
        center, color, shape, offset = self.patch(features).flatten(0, 1).split(self.sizes, -1)
        mine = targets.color > 0
        weight = torch.where(mine, 1.0, 0.3)

        def loss(scores: Tensor, truth: Tensor) -> Tensor:
            losses = F.cross_entropy(scores, truth, reduction="none")
            return (losses * weight).sum() / weight.sum()

        total = (
            2 * F.cross_entropy(center, targets.center)
            + loss(color, targets.color)
            + loss(shape, targets.shape)
            + 2 * F.smooth_l1_loss(offset[mine], targets.offset[mine])
            + 0.5 * F.cross_entropy(background, targets.background)
        )
        core = targets.center == 1
        right = {
            "color": (color.argmax(-1) == targets.color)[core].float().mean().item(),
            "shape": (shape.argmax(-1) == targets.shape)[core].float().mean().item(),
            "centers": (
                (center.argmax(-1) == targets.center)
                .view(len(features), -1)
                .all(1)
                .float()
                .mean()
                .item()
            ),
        }
        return total, right


class Learner(nn.Module):
    """The model and its patch head, with the passes that training needs."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava
        self.head = PatchHead(llava.config.vision_config.hidden_size)

    @property
    def tower(self) -> Any:
        return self.llava.model.vision_tower

    def see(self, pixels: Tensor) -> Tensor:
        """Features of shape (pictures, IMAGE_TOKENS, width); CLIP's class token is left out."""
        return self.tower(pixels).last_hidden_state[:, 1:]

    def read(self, batch: Batch, features: Tensor | None) -> tuple[Tensor, dict[str, list[bool]]]:
        """The loss of the answers, and for each kind which answers are right, token for token."""
        inner = self.llava.model
        embedded = inner.language_model.embed_tokens(batch.ids)
        if features is not None:
            seen = inner.multi_modal_projector(features).flatten(0, 1).to(embedded.dtype)
            embedded = embedded.masked_scatter((batch.ids == IMAGE)[..., None], seen)
        hidden = inner.language_model(
            inputs_embeds=embedded,
            attention_mask=batch.mask.to(embedded.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        weights = batch.weights[:, 1:]
        learned = weights > 0
        scores = self.llava.lm_head(hidden[:, :-1][learned]).float()
        truth = batch.ids[:, 1:][learned]
        losses = F.cross_entropy(scores, truth, reduction="none")
        loss = (losses * weights[learned]).sum() / weights.sum()

        right = torch.ones_like(batch.ids, dtype=torch.bool)
        right[:, 1:][learned] = scores.argmax(-1) == truth
        marks = right.cpu()
        answers: dict[str, list[bool]] = defaultdict(list)
        for kind, row, start, end in batch.spans:
            answers[kind].append(bool(marks[row, start:end].all()))
        return loss, answers


class Progress:
    """A bar with what has been learned so far, and a line of JSON per judgement in a log."""

    def __init__(self, stage: Stage, step: int, line: int, log: Path, *, silent: bool) -> None:
        self._bar = tqdm(
            total=stage.steps,
            initial=step,
            desc=f"{stage.name:9}",
            position=line,
            disable=silent,
            dynamic_ncols=True,
            mininterval=1,
        )
        self._log = None if silent else log
        self._recent: dict[str, float] = {}

    def step(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            if not math.isnan(value):
                self._recent[name] = 0.95 * self._recent.get(name, value) + 0.05 * value
        self._bar.set_postfix({k: f"{v:.2f}" for k, v in self._recent.items()}, refresh=False)
        self._bar.update()

    def judged(self, stage: str, step: int, figures: dict[str, float]) -> None:
        if self._log is not None:
            with self._log.open("a") as log:
                entry = {"stage": stage, "step": step, "time": time.time(), **figures}
                log.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._bar.close()


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the training processes this is, where it computes and where it keeps its work."""

    rank: int
    world: int
    device: str
    work: Path

    def share(self, number: int) -> int:
        """This process's part of a batch of ``number``."""
        return max(1, number // self.world)

    def alone(self) -> Place:
        return Place(0, 1, self.device, self.work)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16)


def _optimizers(parameters: list[tuple[str, nn.Parameter]], stage: Stage) -> list[Any]:
    """Muon for the matrices inside, AdamW for the rest."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    small: list[nn.Parameter] = []
    for name, parameter in parameters:
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
    frozen: tuple[str, ...] = (),
    line: int = 0,
) -> None:
    """Train ``learner`` for one stage, from where the last run of it stopped.

    Args:
        frozen: beginnings of the names of parameters that do not learn in this stage.
        line: of the terminal, for the progress bar.
    """
    kept = place.work / f"{stage.name}.pt"
    parameters = [
        (name, parameter)
        for name, parameter in learner.named_parameters()
        # CLIP's last norm is behind the features that LLaVA takes.
        if parameter.requires_grad and not name.startswith(frozen) and "post_layernorm" not in name
    ]
    optimizers = _optimizers(parameters, stage)
    step = 0
    if kept.exists():
        state = torch.load(kept, map_location=place.device)
        learner.load_state_dict(state["learner"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    first = place.rank == 0
    log = place.work / "log.jsonl"
    progress = Progress(stage, step, line, log, silent=not first)
    saved_at = time.monotonic()
    learner.train()
    while step < stage.steps:
        _set_learning_rate(optimizers, stage, step)
        random = Random(f"{SEED} {stage.name} {step} {place.rank}")
        figures = backward(learner, random)
        gradients = [p.grad for _, p in parameters if p.grad is not None]
        if place.world > 1:
            _average(gradients)
        nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
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
            _keep(kept, learner, optimizers, step)
            saved_at = time.monotonic()
    progress.close()


def _keep(path: Path, learner: Learner, optimizers: list[Any], step: int) -> None:
    part = path.with_suffix(".part")
    state = {
        "learner": learner.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    torch.save(state, part)
    part.replace(path)


def _shares(answers: dict[str, list[bool]]) -> dict[str, float]:
    return {kind: sum(right) / len(right) for kind, right in sorted(answers.items())}


def _share(answers: dict[str, list[bool]], *kinds: str) -> float:
    right = [mark for kind in kinds or answers for mark in answers.get(kind, ())]
    return sum(right) / len(right) if right else math.nan


def _bare_pictures(random: Random, number: int, device: str) -> tuple[Tensor, PatchTargets]:
    shots = [photograph(random_scene(random), random) for _ in range(number)]
    pixels = pixel_values([pixels for pixels, _ in shots]).to(device)
    return pixels, PatchTargets.of([patches for _, patches in shots], device)


def learn_to_see(learner: Learner, place: Place, line: int = 0) -> None:
    if not (place.work / f"{VISION.name}.pt").exists():
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

    run(
        VISION,
        learner,
        backward,
        judge,
        place,
        frozen=("llava.model.language_model", "llava.model.multi_modal", "llava.lm_head"),
        line=line,
    )


def learn_to_talk(learner: Learner, write: Writer, place: Place, line: int = 0) -> None:
    def backward(learner: Learner, random: Random) -> dict[str, float]:
        batch = talk_batch(write, random, place.share(TALK.talks), TALK_ROW, place.device)
        with place.precision():
            loss, answers = learner.read(batch, None)
        loss.backward()
        return {
            "loss": loss.item(),
            "fact": _share(answers, "fact"),
            "count": _share(answers, "count_to"),
            "right": _share(answers),
        }

    run(
        TALK,
        learner,
        backward,
        lambda learner: _judge_talk(learner, write, place),
        place,
        frozen=("llava.model.vision_tower", "llava.model.multi_modal", "head"),
        line=line,
    )


def _judge_talk(learner: Learner, write: Writer, place: Place) -> dict[str, float]:
    batch = talk_batch(write, Random("judge"), 40, TALK_ROW, place.device)
    return _shares(learner.read(batch, None)[1])


def learn_together(learner: Learner, write: Writer, place: Place) -> None:
    def backward(learner: Learner, random: Random) -> dict[str, float]:
        rows = place.share(TOGETHER.pictures)
        batch = picture_batch(write, random, rows, PICTURE_ROW, place.device)
        assert batch.pixels is not None
        assert batch.targets is not None
        with place.precision():
            features = learner.see(batch.pixels)
            loss, answers = learner.read(batch, features)
        patches, _ = learner.head(features, batch.targets)
        (0.75 * loss + _PATCH_SHARE * patches).backward()
        spoken = talk_batch(write, random, place.share(TOGETHER.talks), TALK_ROW, place.device)
        with place.precision():
            talk_loss, talked = learner.read(spoken, None)
        (0.25 * talk_loss).backward()
        return {
            "loss": loss.item(),
            "color": _share(answers, "color"),
            "shape": _share(answers, "shape"),
            "count": _share(answers, "count"),
            "relation": _share(answers, "relation"),
            "pictures": _share(answers),
            "talk": _share(talked),
        }

    def judge(learner: Learner) -> dict[str, float]:
        answers: dict[str, list[bool]] = defaultdict(list)
        random = Random("judge")
        for _ in range(6):
            batch = picture_batch(write, random, 32, PICTURE_ROW, place.device, plain=True)
            assert batch.pixels is not None
            for kind, right in learner.read(batch, learner.see(batch.pixels))[1].items():
                answers[kind] += right
        return {**_shares(answers), **_judge_talk(learner, write, place)}

    run(TOGETHER, learner, backward, judge, place)


def learn_style(
    style: str, words: Any, checkpoint: Path, to: Path, place: Place, line: int
) -> None:
    """Train the LoRA adapter that answers in ``style``, and save it in PEFT's format."""
    stage = replace(ADAPTER, name=style)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=list(_LORA_TARGETS),
            exclude_modules=r".*vision_tower.*",  # CLIP's projections share their names
        ),
    )
    learner = Learner(model).to(place.device)
    write = Writer(words, STYLES[style])

    def backward(learner: Learner, random: Random) -> dict[str, float]:
        batch = picture_batch(write, random, stage.pictures, PICTURE_ROW, place.device)
        assert batch.pixels is not None
        with place.precision():
            loss, answers = learner.read(batch, learner.see(batch.pixels))
        (0.75 * loss).backward()
        spoken = talk_batch(write, random, stage.talks, TALK_ROW, place.device)
        with place.precision():
            talk_loss, talked = learner.read(spoken, None)
        (0.25 * talk_loss).backward()
        return {"loss": loss.item(), "pictures": _share(answers), "talk": _share(talked)}

    def judge(learner: Learner) -> dict[str, float]:
        batch = picture_batch(write, Random("judge"), 48, PICTURE_ROW, place.device, plain=True)
        assert batch.pixels is not None
        answers = learner.read(batch, learner.see(batch.pixels))[1]
        return {**_shares(answers), **_judge_talk(learner, write, place)}

    run(stage, learner, backward, judge, place, frozen=("head",), line=line)
    adapted.peft_config["default"].base_model_name_or_path = "pocket-llava"
    adapted.to(torch.bfloat16).save_pretrained(to / style)
    (to / style / "README.md").unlink()  # PEFT's blank form


def _train_adapters(rank: int, world: int, device: str, work: Path, out: Path, to: Path) -> None:
    """One process's share of the adapters, one at a time."""
    if device == "cpu":
        torch.set_num_threads(1)
    words = AutoTokenizer.from_pretrained(work / "tokenizer")
    for index, style in enumerate(ADAPTERS):
        if index % world == rank:
            learn_style(style, words, out, to, Place(0, 1, device, work), line=index)


def _train(rank: int, world: int, device: str, work: Path, port: int, stages: list[str]) -> None:
    """One training process."""
    if device == "cpu":
        torch.set_num_threads(1)  # two processes of one thread beat one process of two
    place = Place(rank, world, device, work)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    write = Writer(AutoTokenizer.from_pretrained(work / "tokenizer"))

    def fresh() -> Learner:
        return Learner(empty_model(SEED)).to(device)

    # A core each, side by side; alone, one after the other.
    if "vision" in stages and rank == 0:
        learn_to_see(fresh(), place.alone(), line=0)
    if "talk" in stages and rank == world - 1:
        learn_to_talk(fresh(), write, place.alone(), line=world - 1)
    if world > 1:
        dist.barrier()
    if "together" in stages:
        learner = fresh()
        vision, talk = (
            torch.load(work / f"{name}.pt", map_location=device)["learner"]
            for name in ("vision", "talk")
        )
        of_vision = ("llava.model.vision_tower", "head")
        learner.load_state_dict(
            {name: (vision if name.startswith(of_vision) else talk)[name] for name in talk}
        )
        learn_together(learner, write, place)
    if world > 1:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train Pocket LLaVA from nothing. Stopped, it goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    models = Path(__file__).parents[1]
    parser.add_argument(
        "--out", type=Path, default=models / "pocket-llava", help="folder of the checkpoint"
    )
    parser.add_argument(
        "--adapters", type=Path, default=models / "adapters", help="folder of the adapters"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("pocket-training"), help="folder of the unfinished work"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), default=min(2, cores), help="on a CPU"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only some of them"
    )
    options = parser.parse_args(argv)
    work, stages, device = options.work, options.stages, options.device
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer").exists():
        tokenizer().save_pretrained(work / "tokenizer")
    world = 1 if device == "cuda" else options.processes
    try:
        if {"vision", "talk", "together"} & set(stages):
            _in_processes(_train, world, device, work, _free_port(), stages)
        if "save" in stages:
            learner = Learner(empty_model(SEED))
            learner.load_state_dict(torch.load(work / "together.pt", map_location="cpu")["learner"])
            save(learner.llava, AutoTokenizer.from_pretrained(work / "tokenizer"), options.out)
            print(f"Saved to {options.out}.")
        if "adapters" in stages:
            _in_processes(_train_adapters, world, device, work, options.out, options.adapters)
            print(f"Saved to {options.adapters}.")
    except KeyboardInterrupt:
        sys.exit(f"Stopped; the same command goes on from {work}.")


def _in_processes(function: Callable[..., None], world: int, *arguments: Any) -> None:
    if world == 1:
        function(0, 1, *arguments)
    else:
        mp.spawn(function, (world, *arguments), nprocs=world)
