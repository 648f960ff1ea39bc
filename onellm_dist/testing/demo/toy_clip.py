"""The stand-in for CLIP: the toy preset's encoder, pretrained on image and caption pairs of the toy world, then frozen.

What a prototype needed before align could learn from it: batches of which half differ only in what is hard to see,
BatchNorm before the contrastive head, 2-D sin-cos positions to start from. What makes it quick on a CPU: most background patches are
left out until the last steps (FLIP, Li et al. 2023, section 3), query and key maps start equal, so that a patch first looks
at its neighbours (Trockman and Kolter 2023), and Muon for the matrices. Pooling, BatchNorm, head and text side are thrown away.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast

from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.sequence_lengths import SequenceLengths
from onellm_dist.shards.sources.toyworld import world
from onellm_dist.shards.sources.toyworld.render import render_sample
from onellm_dist.testing.demo.toy_llm import cosine

MODALITY = "image"
PATCH, GRID = 14, 16
PATCH_VALUES = 3 * PATCH * PATCH
_BUSY = 24
"""A patch with a pixel this far (of 255) from the image's usual colour shows something."""


@dataclass(frozen=True)
class ClipRecipe:
    """How the stand-in CLIP is pretrained."""

    images: int = 26_000
    """Images seen."""
    bank: int = 8_000
    """Different images among them."""
    batch: int = 64
    kept: int = 48
    """Patches of an image that are kept: those that show something, and random others."""
    whole: float = 0.2
    """Share of the steps, the last ones, in which every patch is kept."""
    lr: float = 2e-3
    muon_lr: float = 4e-3
    warmup: int = 30
    seed: int = 0


class ImageBank:
    """Toy images as patches in memory, with captions and what a hard batch shares.

    Attributes:
        patches: [n, 256, 588] uint8, channel-major within a patch as the encoder's patch embedding reads them.
        busy: [n, 256] bool, the patch shows something.
        captions: [n].
        kinds: [n] index of the caption among the different ones.
    """

    def __init__(
        self, split: str, count: int, seed: int, tell: Callable[[int], None] | None = None
    ) -> None:
        self.patches = np.empty((count, GRID * GRID, PATCH_VALUES), dtype=np.uint8)
        self.busy = np.empty((count, GRID * GRID), dtype=bool)
        self.captions: list[str] = []
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in range(count):
            sample = render_sample(MODALITY, split, i, seed)
            patches = to_patches(
                np.asarray(Image.open(io.BytesIO(sample.parts["jpg"])).convert("RGB"))
            )
            usual = np.median(patches, axis=0)
            self.patches[i], self.busy[i] = patches, (np.abs(patches - usual) > _BUSY).any(axis=1)
            self.captions.append(sample.caption)
            groups.setdefault((sample.attributes["color"], sample.attributes["size"]), []).append(i)
            if tell is not None:
                tell(i + 1)
        self.groups = [np.array(g) for g in groups.values()]
        names = {caption: k for k, caption in enumerate(sorted(set(self.captions)))}
        self.kinds = torch.tensor([names[c] for c in self.captions])

    def hard_batches(self, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Endless index batches; half of each shares colour and size, so that shape and place must be seen."""
        while True:
            group = self.groups[int(rng.integers(len(self.groups)))]
            alike = rng.choice(group, min(batch // 2, len(group)), replace=False)
            yield np.concatenate([alike, rng.integers(len(self.captions), size=batch - len(alike))])


def to_patches(picture: np.ndarray) -> np.ndarray:
    """[224, 224, 3] uint8 -> [256, 588]."""
    grid = picture.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return grid.reshape(GRID * GRID, PATCH_VALUES)


class ContrastiveHead(nn.Module):
    """Everything that is thrown away: mean pooling, BatchNorm and a linear map for images, a bag of words for captions."""

    def __init__(self, width: int, vocabulary: int, dimension: int = 64) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.image = nn.Linear(width, dimension, bias=False)
        self.words = nn.EmbeddingBag(vocabulary, dimension, mode="mean")
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def logits(self, tokens: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Features [B, L + 1, D] and caption ids [C, S] -> [B, C]."""
        images = F.normalize(self.image(self.norm(tokens[:, 1:].mean(dim=1))), dim=-1)
        captions = F.normalize(self.words(texts), dim=-1)
        return self.log_scale.exp().clamp(max=100.0) * images @ captions.T


def contrastive_loss(logits: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss for logits [B, B]; pairs of one caption (kinds [B]) are all right answers."""
    right = (kinds[:, None] == kinds[None]).float()
    by_image = -(F.log_softmax(logits, dim=1) * right / right.sum(dim=1, keepdim=True)).sum(dim=1)
    by_text = -(F.log_softmax(logits, dim=0) * right / right.sum(dim=0, keepdim=True)).sum(dim=0)
    return (by_image.mean() + by_text.mean()) / 2


@torch.no_grad()
def prepare_encoder(encoder: Encoder, generator: torch.Generator) -> None:
    """Set what a small encoder starts better from: sin-cos positions, equal query and key maps."""
    width = encoder.class_token.weight.shape[0]
    encoder.positions.weight.copy_(sincos_positions(width))
    for block in encoder.blocks:
        attention: Any = block.attn
        size = width // attention.heads
        for head in range(attention.heads):
            maps = torch.linalg.qr(torch.randn(width, size, generator=generator))[0].T * 1.5
            for start in (0, width):
                attention.qkv.weight[start + head * size : start + (head + 1) * size] = maps


def sincos_positions(width: int) -> torch.Tensor:
    """[257, width]: zeros for the class token; half of the channels for the row, half for the column (Chen et al. 2021)."""
    rates = 10000.0 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.arange(GRID)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(GRID, GRID, -1), line[None].expand(GRID, GRID, -1)
    return torch.cat(
        [torch.zeros(1, width), torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, width)]
    )


def encode_patches(
    encoder: Encoder, bank: ImageBank, rows: np.ndarray, kept: int | None, rng: np.random.Generator
) -> torch.Tensor:
    """Features [B, L + 1, D] of images of the bank; `kept` patches of each, or all of them."""
    pixels = bank.patches[rows]
    if kept is None:
        chosen = torch.arange(GRID * GRID).expand(len(rows), -1)
    else:
        wanted = bank.busy[rows] + 0.9 * rng.random((len(rows), GRID * GRID))
        picked = np.argpartition(-wanted, kept - 1, axis=1)[:, :kept]
        pixels, chosen = (
            np.take_along_axis(pixels, picked[..., None], axis=1),
            torch.from_numpy(picked),
        )
    mean, std = (torch.tensor(v).repeat_interleave(PATCH * PATCH) for v in (CLIP_MEAN, CLIP_STD))
    values = (torch.from_numpy(pixels).float() / 255 - mean) / std
    positions = encoder.positions.weight
    embedded = F.linear(values, encoder.patches.weight.flatten(1)) + positions[1:][chosen]
    first = (encoder.class_token.weight + positions[0]).expand(len(rows), 1, -1)
    x = torch.cat([first, embedded], dim=1)
    n, length, width = x.shape
    return encoder(
        x.reshape(n * length, width), SequenceLengths.from_lengths((length,) * n, device=x.device)
    ).reshape(n, length, width)


def caption_ids(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> torch.Tensor:
    """[n, S] ids of captions of equal length (a modality's all are)."""
    return torch.tensor(tokenizer(list(captions), add_special_tokens=False).input_ids)


def pretrain_clip(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    recipe: ClipRecipe,
    bank: ImageBank,
    tell: Callable[[int, float], None] | None = None,
) -> tuple[ContrastiveHead, list[float]]:
    """Train `encoder` in place; returns the head (for `top1`) and the loss of every step. `tell(step, loss)` after each."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    prepare_encoder(encoder, torch.Generator().manual_seed(recipe.seed))
    encoder.requires_grad_(True)
    head = ContrastiveHead(encoder.class_token.weight.shape[0], len(tokenizer))
    optimizers = _optimizers(encoder, head, recipe)
    parameters = [*encoder.parameters(), *head.parameters()]
    texts = caption_ids(tokenizer, bank.captions)
    steps, losses = steps_of(recipe), []
    encoder.train()
    for step, rows in zip(range(steps), bank.hard_batches(recipe.batch, rng), strict=False):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * cosine(step, steps, recipe.warmup)
        features = encode_patches(
            encoder, bank, rows, recipe.kept if step < steps * (1 - recipe.whole) else None, rng
        )
        loss = contrastive_loss(head.logits(features, texts[rows]), bank.kinds[rows])
        encoder.zero_grad()
        head.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if tell is not None:
            tell(step + 1, losses[-1])
    encoder.requires_grad_(False)
    return head, losses


def steps_of(recipe: ClipRecipe) -> int:
    """Optimizer steps of the recipe."""
    return recipe.images // recipe.batch


def _optimizers(
    encoder: Encoder, head: nn.Module, recipe: ClipRecipe
) -> list[torch.optim.Optimizer]:
    matrices = [
        p for name, p in encoder.named_parameters() if name.startswith("blocks.") and p.ndim == 2
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*encoder.parameters(), *head.parameters()] if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05),
        torch.optim.Muon(
            matrices, lr=recipe.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@torch.inference_mode()
def top1(
    encoder: Encoder,
    head: ContrastiveHead,
    tokenizer: PreTrainedTokenizerFast,
    bank: ImageBank,
    *,
    batches: int = 4,
    seed: int = 7,
) -> float:
    """Share of images whose own caption scores highest within a hard batch of 64, every patch kept."""
    rng = np.random.default_rng(seed)
    texts = caption_ids(tokenizer, bank.captions)
    head.eval()
    encoder.eval()
    right = total = 0
    for rows, _ in zip(bank.hard_batches(64, rng), range(batches), strict=False):
        best = head.logits(encode_patches(encoder, bank, rows, None, rng), texts[rows]).argmax(
            dim=1
        )
        right += int((bank.kinds[rows][best] == bank.kinds[rows]).sum())
        total += len(rows)
    return right / total


@torch.inference_mode()
def zero_shot(
    encoder: Encoder, head: ContrastiveHead, tokenizer: PreTrainedTokenizerFast, bank: ImageBank
) -> float:
    """Share of images whose own caption scores highest among all captions of the modality, held-out ones included."""
    every = [
        world.make_caption(MODALITY, world.to_attributes(MODALITY, c)) for c in world.list_combinations(MODALITY)
    ]
    texts = caption_ids(tokenizer, every)
    rng = np.random.default_rng(0)
    head.eval()
    encoder.eval()
    right = 0
    for start in range(0, len(bank.captions), 64):
        rows = np.arange(start, min(start + 64, len(bank.captions)))
        best = head.logits(encode_patches(encoder, bank, rows, None, rng), texts).argmax(dim=1)
        right += sum(every[b] == bank.captions[i] for b, i in zip(best.tolist(), rows, strict=True))
    return right / len(bank.captions)
