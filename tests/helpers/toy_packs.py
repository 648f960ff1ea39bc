"""Packs of random samples for the toy model."""

from __future__ import annotations

import torch

from onellm_dist.modalities import all_modalities
from onellm_dist.packed import IGNORE, PackedBatch


def make_toy_pack(names: list[str], text: int) -> PackedBatch:
    """One sample per name, each of that modality and with `text` text tokens."""
    generator = torch.Generator().manual_seed(1)
    values = {
        m: torch.randn((names.count(m), *modality.value_shape), generator=generator)
        for m, modality in all_modalities().items()
    }
    ids = torch.randint(3, 400, (text * len(names),), generator=generator)
    labels = ids.clone()
    labels[::text] = IGNORE
    return PackedBatch(
        ids,
        labels,
        (text,) * len(names),
        tuple((name,) for name in names),
        values,
        torch.ones(len(names)),
    )
