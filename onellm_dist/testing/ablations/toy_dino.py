"""An encoder that sees no captions: the toy preset's, pretrained as DINOv2 is (arXiv 2304.07193).

A student predicts what a teacher, the moving average of its weights, sees in another view: of the
class token (DINO), and of patches that were hidden from the student (iBOT). Both predict shares of
prototypes, which Sinkhorn-Knopp spreads over a batch. A view is a random part of the patches, with
other brightness and contrast; colours stay, because the toy world's captions name them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from onellm_dist.model.encoder import Encoder
from onellm_dist.testing.demo.tower_optimizers import make_optimizers, set_rates
from onellm_dist.testing.demo.toy_clip import (
    GRID,
    ImageBank,
    encode_patch_values,
    normalise_patches,
    prepare_encoder,
)

SINKHORN_ROUNDS = 3
BUSY_BONUS = 0.5
"""How much likelier a patch that shows something is in a view."""
JITTER = 0.2


@dataclass(frozen=True)
class DinoPretraining:
    """How the encoder is pretrained."""

    images: int = 26_000
    """Images seen, each in two views."""
    bank: int = 8_000
    """Different images among them."""
    batch: int = 64
    kept: int = 96
    """Patches of a view."""
    masked: float = 0.4
    """Share of a view's patches that the student does not see."""
    prototypes: int = 256
    momentum: float = 0.99
    """Momentum of the teacher."""
    teacher_temperature: float = 0.06
    student_temperature: float = 0.1
    lr: float = 1e-3
    muon_lr: float = 2e-3
    warmup: int = 30
    seed: int = 0

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.images // self.batch


class PrototypeHead(nn.Module):
    """Features to logits over prototypes; discarded after pretraining.

    Args:
        width: width of the encoder.
        prototypes: number of prototypes.
        dimension: size of the space that they live in.
    """

    def __init__(self, width: int, prototypes: int, dimension: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dimension)
        )
        self.prototypes = nn.Linear(dimension, prototypes, bias=False)
        self.hidden = nn.Parameter(torch.zeros(width))
        """What stands in the place of a hidden patch."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, D] -> [n, K] cosines."""
        directions = F.normalize(self.prototypes.weight, dim=-1)
        return F.normalize(self.mlp(features), dim=-1) @ directions.T


@dataclass(frozen=True)
class View:
    """Some patches of each image."""

    values: torch.Tensor
    """[B, N, 588]."""
    chosen: torch.Tensor
    """[B, N], which patches."""
    hidden: torch.Tensor
    """[B, N] bool, whether the student does not see it."""


def draw_view(
    bank: ImageBank, rows: np.ndarray, recipe: DinoPretraining, rng: np.random.Generator
) -> View:
    """Draw a view of images of the bank."""
    wanted = BUSY_BONUS * bank.busy[rows] + rng.random((len(rows), GRID * GRID))
    chosen = np.argpartition(-wanted, recipe.kept - 1, axis=1)[:, : recipe.kept]
    values = normalise_patches(np.take_along_axis(bank.patches[rows], chosen[..., None], axis=1))
    scale, shift = (torch.from_numpy(rng.normal(0, JITTER, (len(rows), 1, 1))) for _ in range(2))
    hidden = torch.from_numpy(rng.random(chosen.shape) < recipe.masked)
    return View((values * (1 + scale) + shift).float(), torch.from_numpy(chosen), hidden)


def spread(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sinkhorn-Knopp: [n, K] logits -> [n, K] shares; every prototype has its part of the rows."""
    shares = torch.exp(logits.double() / temperature)
    for _ in range(SINKHORN_ROUNDS):
        shares = shares / shares.sum(0, keepdim=True)
        shares = shares / shares.sum(1, keepdim=True)
    return shares.float()


class SelfDistillation:
    """The student, its teacher, and the loss between them.

    Args:
        encoder: the student.
        recipe: how it is pretrained.
    """

    def __init__(self, encoder: Encoder, recipe: DinoPretraining) -> None:
        self._recipe = recipe
        self.encoder = encoder
        self.head = PrototypeHead(encoder.class_token.weight.shape[0], recipe.prototypes)
        self._teacher = copy.deepcopy(encoder)
        self._teacher_head = copy.deepcopy(self.head)
        self._teacher.requires_grad_(False)
        self._teacher_head.requires_grad_(False)

    def compute_loss(self, views: tuple[View, View]) -> torch.Tensor:
        """DINO's loss between the views, and iBOT's within each."""
        recipe = self._recipe
        with torch.no_grad():
            taught = [self._look(self._teacher, None, view) for view in views]
        seen = [self._look(self.encoder, self.head.hidden, view) for view in views]
        loss = torch.zeros(())
        for mine, other in ((0, 1), (1, 0)):
            pairs = [(taught[other][:, 0], seen[mine][:, 0])]
            hidden = views[mine].hidden
            pairs.append((taught[mine][:, 1:][hidden], seen[mine][:, 1:][hidden]))
            for teacher, student in pairs:
                target = spread(self._teacher_head(teacher), recipe.teacher_temperature)
                found = F.log_softmax(self.head(student) / recipe.student_temperature, dim=-1)
                loss = loss - (target * found).sum(-1).mean() / 4
        return loss

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher a little towards the student."""
        for own, student in ((self._teacher, self.encoder), (self._teacher_head, self.head)):
            for a, b in zip(own.parameters(), student.parameters(), strict=True):
                a.lerp_(b, 1 - self._recipe.momentum)

    @staticmethod
    def _look(encoder: Encoder, hidden: torch.Tensor | None, view: View) -> torch.Tensor:
        masked = None if hidden is None else (view.hidden, hidden)
        return encode_patch_values(encoder, view.values, view.chosen, masked)


def pretrain_dino(
    encoder: Encoder,
    recipe: DinoPretraining,
    bank: ImageBank,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `encoder` in place.

    Args:
        encoder: the encoder.
        recipe: how it is pretrained.
        bank: its images.
        on_step: called with the steps done and the loss after each step.

    Returns:
        The loss of every step.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    prepare_encoder(encoder, torch.Generator().manual_seed(recipe.seed))
    encoder.requires_grad_(True)
    both = SelfDistillation(encoder, recipe)
    optimizers = make_optimizers(encoder, both.head, recipe.lr, recipe.muon_lr)
    parameters = [*encoder.parameters(), *both.head.parameters()]
    losses = []
    encoder.train()
    for step in range(recipe.steps):
        set_rates(optimizers, step, recipe.steps, recipe.warmup)
        rows = rng.integers(len(bank.captions), size=recipe.batch)
        first, second = (draw_view(bank, rows, recipe, rng) for _ in range(2))
        loss: Any = both.compute_loss((first, second))
        encoder.zero_grad()
        both.head.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        both.update_teacher()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    encoder.requires_grad_(False)
    return losses


@torch.inference_mode()
def measure_neighbours(encoder: Encoder, bank: ImageBank, batch: int = 64) -> float:
    """Share of images whose nearest other image has the same caption.

    Args:
        encoder: the encoder.
        bank: the images.
        batch: images that are encoded together.
    """
    encoder.eval()
    every = torch.arange(GRID * GRID)
    features = []
    for start in range(0, len(bank.captions), batch):
        values = normalise_patches(bank.patches[start : start + batch])
        tokens = encode_patch_values(encoder, values, every.expand(len(values), -1))
        features.append(tokens[:, 1:].mean(1))
    found = torch.cat(features)
    found = F.normalize(found - found.mean(0), dim=-1)
    nearest = (found @ found.T).fill_diagonal_(-2).argmax(1)
    return float((bank.caption_ids[nearest] == bank.caption_ids).float().mean())
