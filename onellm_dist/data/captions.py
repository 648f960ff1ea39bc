"""Which caption of a sample with several is read in which epoch: a pure function of run seed, sample and epoch, never of a worker."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onellm_dist.data.order import derive_key, hash_words

Ints = NDArray[np.int64]


def chosen_captions(
    seed: int, dataset: str, shard: str, rows: Ints, epochs: Ints, counts: Ints
) -> Ints:
    """The caption that each sample is read with, [k] in 0 .. counts - 1, about evenly over the epochs (the reference draws at random).

    Args:
        dataset, shard: their names; with `rows` [k] they are the samples.
        epochs: [k], how often the dataset had been gone through before.
        counts: [k], captions of each sample, at least 1.
    """
    chosen = np.zeros_like(rows)
    for epoch in np.unique(epochs[counts > 1]).tolist():
        here = np.flatnonzero((epochs == epoch) & (counts > 1))
        words = hash_words(rows[here], derive_key("caption", seed, dataset, shard, epoch))
        chosen[here] = ((words >> np.uint64(1)) % counts[here].astype(np.uint64)).astype(np.int64)
    return chosen
