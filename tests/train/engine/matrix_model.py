"""A tiny OneLLM, and steps of samples for it.

Modalities are absent here and there; samples are assigned to ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig

from onellm_dist.modalities import all_modalities
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.packed import IGNORE, PackedBatch

MODALITIES = ("image", "depth", "imu")
VOCABULARY, TOKENS, SEED = 64, 6, 5
STEP_MODALITIES: tuple[tuple[str, ...], ...] = (
    ("imu", "depth", "image", "depth", "image", "image", "imu", "image"),
    ("image",) * 8,
    ("imu", "imu", "imu", "image", "image", "image", "", "image"),
    ("depth", "imu", "depth", "imu", "depth", "imu", "depth", "depth"),
    ("depth",) * 5,
)
"""Step modulo 5 -> the modality of each sample ("": text alone).

No step but the first has all of them. The last samples, and so the last micro-batches, lack some
even there; five samples leave ranks without one.
"""


def tiny_config(layers: int = 2) -> OneLLMConfig:
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return OneLLMConfig(
        vision=OneLLMVisionConfig(width=32, layers=2, heads=2, patch_size=56, output_dim=16),
        upm=OneLLMUPMConfig(experts=2, blocks=2, heads=2, ffn=64, router_hidden=32),
        text_config=text,
        modalities=MODALITIES,
    )


def get_step_modalities(step: int) -> tuple[str, ...]:
    return STEP_MODALITIES[step % len(STEP_MODALITIES)]


def global_valid_tokens(step: int) -> int:
    """Supervised tokens of a step."""
    return (TOKENS - 1) * len(get_step_modalities(step))


def make_pack(step: int, numbers: Sequence[int]) -> PackedBatch:
    """Samples `numbers` of a step in one pack; none: an empty micro-batch."""
    names = [get_step_modalities(step)[n] for n in numbers]
    drawn = {n: torch.Generator().manual_seed(1000 * step + n) for n in numbers}
    values = {}
    for modality in MODALITIES:
        shape = all_modalities()[modality].value_shape
        own = [
            torch.randn(shape, generator=drawn[n])
            for n, name in zip(numbers, names, strict=True)
            if name == modality
        ]
        values[modality] = torch.stack(own) if own else torch.zeros((0, *shape))
    if not numbers:
        return PackedBatch(
            torch.tensor([1]),
            torch.tensor([IGNORE]),
            (1,),
            ((),),
            values,
            torch.zeros(1),
            is_empty=True,
        )
    # Few different words, so that there is something to learn in 20 steps.
    ids = torch.stack([torch.randint(3, 7, (TOKENS,), generator=drawn[n]) for n in numbers])
    ids[:, 0] = 1
    labels = ids.clone()
    labels[:, 0] = IGNORE
    return PackedBatch(
        ids.flatten(),
        labels.flatten(),
        (TOKENS,) * len(numbers),
        tuple((n,) if n else () for n in names),
        values,
        torch.ones(len(numbers)),
        tuple(f"{step}-{n}" for n in numbers),
    )


def assign_samples(step: int, ranks: int, accumulate: int | None) -> list[list[list[int]]]:
    """[rank][micro-batch] -> sample numbers.

    Args:
        step: index of the step.
        ranks: number of ranks.
        accumulate: micro-batches per rank, filled in order; None: a micro-batch per sample.
    """
    count = len(get_step_modalities(step))
    own = [list(range(rank, count, ranks)) for rank in range(ranks)]
    micro = max(map(len, own)) if accumulate is None else accumulate
    size = [-(-len(numbers) // micro) or 1 for numbers in own]
    return [
        [numbers[i * s : (i + 1) * s] for i in range(micro)]
        for numbers, s in zip(own, size, strict=True)
    ]
