"""The model as it learns: its passes over training batches, and the head that guides its eyes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from models.pocket.architecture import IMAGE
from models.pocket.lessons import Batch, PatchTargets
from models.pocket.scenes import BACKGROUNDS, COLORS, SHAPES


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
        placed = (center.argmax(-1) == targets.center).unflatten(0, (len(features), -1)).all(1)
        right = {
            "color": (color.argmax(-1) == targets.color)[core].float().mean().item(),
            "shape": (shape.argmax(-1) == targets.shape)[core].float().mean().item(),
            "centers": placed.float().mean().item(),
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
