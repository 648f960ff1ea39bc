"""The toy CLIP: the toy preset's encoder, pretrained on images and captions of the toy world.

Align could learn from it only with: batches of which half differ only in what is hard to see,
BatchNorm before the contrastive head, and 2-D sin-cos positions to start from. It is quick on a CPU
because most background patches are left out until the last steps (FLIP, Li et al. 2023, section 3),
because query and key maps start equal, so that a patch first looks at its neighbours (Trockman and
Kolter 2023), and because Muon trains the matrices. Pooling, BatchNorm, head and text side are
discarded; then the encoder is frozen.
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
from onellm_dist.testing.demo.tower_optimizers import make_optimizers, set_rates

MODALITY = "image"
PATCH = 14
GRID = 16
PATCH_VALUES = 3 * PATCH * PATCH
BUSY = 24
"""A patch shows something if a pixel differs so much (of 255) from the image's usual patch."""
TEST_BATCH = 64


@dataclass(frozen=True)
class ClipPretraining:
    """How the toy CLIP is pretrained."""

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

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.images // self.batch


class ImageBank:
    """Toy images as patches in memory, with captions and what a hard batch has in common.

    Attributes:
        patches: [n, 256, 588] uint8, channel-major within a patch, as the encoder's patch embedding
            reads them.
        busy: [n, 256] bool, whether the patch shows something.
        captions: [n].
        caption_ids: [n] index of the caption among the different ones.
        groups: indices of the images of each colour and size.

    Args:
        split: split of the toy world.
        count: number of images.
        seed: seed of the toy world.
        on_image: called with the number of images rendered.
    """

    def __init__(
        self, split: str, count: int, seed: int, on_image: Callable[[int], None] | None = None
    ) -> None:
        self.patches = np.empty((count, GRID * GRID, PATCH_VALUES), dtype=np.uint8)
        self.busy = np.empty((count, GRID * GRID), dtype=bool)
        self.captions: list[str] = []
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in range(count):
            sample = render_sample(MODALITY, split, i, seed)
            picture = Image.open(io.BytesIO(sample.parts["jpg"])).convert("RGB")
            patches = to_patches(np.asarray(picture))
            usual = np.median(patches, axis=0)
            self.patches[i] = patches
            self.busy[i] = (np.abs(patches - usual) > BUSY).any(axis=1)
            self.captions.append(sample.caption)
            groups.setdefault((sample.attributes["color"], sample.attributes["size"]), []).append(i)
            if on_image is not None:
                on_image(i + 1)
        self.groups = [np.array(group) for group in groups.values()]
        different = {caption: k for k, caption in enumerate(sorted(set(self.captions)))}
        self.caption_ids = torch.tensor([different[caption] for caption in self.captions])

    def draw_hard_batches(self, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Draw batches of image indices without end.

        Half of each batch has one colour and size, so that shape and place must be seen.

        Args:
            batch: images of a batch.
            rng: source of the draw.
        """
        while True:
            group = self.groups[int(rng.integers(len(self.groups)))]
            alike = rng.choice(group, min(batch // 2, len(group)), replace=False)
            yield np.concatenate([alike, rng.integers(len(self.captions), size=batch - len(alike))])


def to_patches(picture: np.ndarray) -> np.ndarray:
    """Cut a picture [224, 224, 3] uint8 into patches [256, 588]."""
    grid = picture.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return grid.reshape(GRID * GRID, PATCH_VALUES)


class ContrastiveHead(nn.Module):
    """What is discarded after pretraining.

    Images go through mean pooling, BatchNorm and a linear map, captions through a bag of words.

    Args:
        width: width of the encoder.
        vocabulary: number of tokens.
        dimension: size of the joint space.
    """

    def __init__(self, width: int, vocabulary: int, dimension: int = 64) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.image = nn.Linear(width, dimension, bias=False)
        self.words = nn.EmbeddingBag(vocabulary, dimension, mode="mean")
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def compute_logits(self, tokens: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Compare images with captions.

        Args:
            tokens: [B, L + 1, D], features of images.
            texts: [C, S], token ids of captions.

        Returns:
            [B, C] logits.
        """
        images = F.normalize(self.image(self.norm(tokens[:, 1:].mean(dim=1))), dim=-1)
        captions = F.normalize(self.words(texts), dim=-1)
        return self.log_scale.exp().clamp(max=100.0) * images @ captions.T


def compute_contrastive_loss(logits: torch.Tensor, caption_ids: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss; all pairs with the same caption are right answers.

    Args:
        logits: [B, B].
        caption_ids: [B], index of each caption among the different ones.
    """
    right = (caption_ids[:, None] == caption_ids[None]).float()
    by_image = -(F.log_softmax(logits, dim=1) * right / right.sum(dim=1, keepdim=True)).sum(dim=1)
    by_text = -(F.log_softmax(logits, dim=0) * right / right.sum(dim=0, keepdim=True)).sum(dim=0)
    return (by_image.mean() + by_text.mean()) / 2


@torch.no_grad()
def prepare_encoder(encoder: Encoder, generator: torch.Generator) -> None:
    """Give a small encoder a better start: sin-cos positions, and equal query and key maps."""
    width = encoder.class_token.weight.shape[0]
    encoder.positions.weight.copy_(make_sincos_positions(width))
    for block in encoder.blocks:
        attention: Any = block.attn
        size = width // attention.heads
        for head in range(attention.heads):
            maps = torch.linalg.qr(torch.randn(width, size, generator=generator))[0].T * 1.5
            for start in (0, width):
                attention.qkv.weight[start + head * size : start + (head + 1) * size] = maps


def make_sincos_positions(width: int) -> torch.Tensor:
    """Make 2-D sin-cos positions (Chen et al. 2021).

    Half of the channels are for the row, half for the column. The class token has zeros.

    Returns:
        [257, width].
    """
    rates = 10000.0 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.arange(GRID)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(GRID, GRID, -1), line[None].expand(GRID, GRID, -1)
    grid = torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, width)
    return torch.cat([torch.zeros(1, width), grid])


def encode_patches(
    encoder: Encoder, bank: ImageBank, rows: np.ndarray, kept: int | None, rng: np.random.Generator
) -> torch.Tensor:
    """Encode images of the bank.

    Args:
        encoder: the encoder.
        bank: the images.
        rows: indices of the images.
        kept: patches of each image to keep; None: all.
        rng: source of the choice among patches that show nothing.

    Returns:
        [B, L + 1, D] features.
    """
    pixels = bank.patches[rows]
    chosen = torch.arange(GRID * GRID).expand(len(rows), -1)
    if kept is not None:
        wanted = bank.busy[rows] + 0.9 * rng.random((len(rows), GRID * GRID))
        picked = np.argpartition(-wanted, kept - 1, axis=1)[:, :kept]
        pixels = np.take_along_axis(pixels, picked[..., None], axis=1)
        chosen = torch.from_numpy(picked)
    return encode_patch_values(encoder, normalise_patches(pixels), chosen)


def normalise_patches(patches: np.ndarray) -> torch.Tensor:
    """Patches [..., 588] uint8 -> fp32, normalised as CLIP's pictures are."""
    mean, std = (torch.tensor(v).repeat_interleave(PATCH * PATCH) for v in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(patches).float() / 255 - mean) / std


def encode_patch_values(
    encoder: Encoder,
    values: torch.Tensor,
    chosen: torch.Tensor,
    masked: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Encode some patches of each image.

    Args:
        encoder: the encoder.
        values: [B, N, 588] normalised patches.
        chosen: [B, N], their places in the image.
        masked: [B, N] which patches are hidden, and [D] what stands in their place; None: none.

    Returns:
        [B, N + 1, D] features.
    """
    positions = encoder.positions.weight
    embedded = F.linear(values, encoder.patches.weight.flatten(1))
    if masked is not None:
        embedded = torch.where(masked[0][..., None], masked[1], embedded)
    embedded = embedded + positions[1:][chosen]
    first = (encoder.class_token.weight + positions[0]).expand(len(values), 1, -1)
    x = torch.cat([first, embedded], dim=1)
    n, length, width = x.shape
    lengths = SequenceLengths.from_lengths((length,) * n, device=x.device)
    features: torch.Tensor = encoder(x.reshape(n * length, width), lengths)
    return features.reshape(n, length, width)


def tokenize_captions(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> torch.Tensor:
    """Token ids [n, S] of captions of one modality, which all have the same length."""
    return torch.tensor(tokenizer(list(captions), add_special_tokens=False).input_ids)


def pretrain_clip(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    recipe: ClipPretraining,
    bank: ImageBank,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[ContrastiveHead, list[float]]:
    """Train `encoder` in place.

    Args:
        encoder: the encoder.
        tokenizer: tokenizer of the captions.
        recipe: how it is pretrained.
        bank: its images.
        on_step: called with the steps done and the loss after each step.

    Returns:
        The head (for `measure_top1`), and the loss of every step.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    prepare_encoder(encoder, torch.Generator().manual_seed(recipe.seed))
    encoder.requires_grad_(True)
    head = ContrastiveHead(encoder.class_token.weight.shape[0], len(tokenizer))
    optimizers = make_optimizers(encoder, head, recipe.lr, recipe.muon_lr)
    parameters = [*encoder.parameters(), *head.parameters()]
    texts = tokenize_captions(tokenizer, bank.captions)
    steps, losses = recipe.steps, []
    encoder.train()
    for step, rows in zip(range(steps), bank.draw_hard_batches(recipe.batch, rng), strict=False):
        set_rates(optimizers, step, steps, recipe.warmup)
        kept = recipe.kept if step < steps * (1 - recipe.whole) else None
        features = encode_patches(encoder, bank, rows, kept, rng)
        logits = head.compute_logits(features, texts[rows])
        loss = compute_contrastive_loss(logits, bank.caption_ids[rows])
        encoder.zero_grad()
        head.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    encoder.requires_grad_(False)
    return head, losses


@torch.inference_mode()
def measure_top1(
    encoder: Encoder,
    head: ContrastiveHead,
    tokenizer: PreTrainedTokenizerFast,
    bank: ImageBank,
    *,
    batches: int = 4,
    seed: int = 7,
) -> float:
    """Share of images whose own caption scores highest within a hard batch, with every patch kept.

    Args:
        encoder: the encoder.
        head: the head it was trained with.
        tokenizer: tokenizer of the captions.
        bank: the images.
        batches: number of batches.
        seed: seed of their draw.
    """
    rng = np.random.default_rng(seed)
    texts = tokenize_captions(tokenizer, bank.captions)
    head.eval()
    encoder.eval()
    right = total = 0
    for rows, _ in zip(bank.draw_hard_batches(TEST_BATCH, rng), range(batches), strict=False):
        logits = head.compute_logits(encode_patches(encoder, bank, rows, None, rng), texts[rows])
        found, wanted = bank.caption_ids[rows][logits.argmax(dim=1)], bank.caption_ids[rows]
        right += int((found == wanted).sum())
        total += len(rows)
    return right / total


@torch.inference_mode()
def measure_zero_shot(
    encoder: Encoder, head: ContrastiveHead, tokenizer: PreTrainedTokenizerFast, bank: ImageBank
) -> float:
    """Share of images whose own caption scores highest among all captions of the modality.

    The captions include the held-out ones.

    Args:
        encoder: the encoder.
        head: the head it was trained with.
        tokenizer: tokenizer of the captions.
        bank: the images.
    """
    captions = [
        world.make_caption(MODALITY, world.to_attributes(MODALITY, combination))
        for combination in world.list_combinations(MODALITY)
    ]
    texts = tokenize_captions(tokenizer, captions)
    rng = np.random.default_rng(0)
    head.eval()
    encoder.eval()
    right = 0
    for start in range(0, len(bank.captions), TEST_BATCH):
        rows = np.arange(start, min(start + TEST_BATCH, len(bank.captions)))
        features = encode_patches(encoder, bank, rows, None, rng)
        best = head.compute_logits(features, texts).argmax(dim=1).tolist()
        right += sum(captions[b] == bank.captions[i] for b, i in zip(best, rows, strict=True))
    return right / len(bank.captions)
