"""Which caption of a sample with several is read in which epoch.

The choice is a pure function of run seed, sample and epoch; it never depends on a worker.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onellm_dist.data.order import derive_key, hash_words

Ints = NDArray[np.int64]


def choose_captions(
    seed: int, dataset: str, shard: str, rows: Ints, epochs: Ints, counts: Ints
) -> Ints:
    """Choose a caption for each of k samples of one shard, about evenly over the epochs.

    (The reference draws captions at random.)

    Args:
        seed: the run's seed.
        dataset: name of the dataset.
        shard: name of the shard.
        rows: [k] rows of the samples in the shard's index.
        epochs: [k] how many times the dataset had been read completely before.
        counts: [k] number of captions of each sample, at least 1.

    Returns:
        [k] indices, each in 0 .. counts - 1.
    """
    chosen = np.zeros_like(rows)
    for epoch in np.unique(epochs[counts > 1]).tolist():
        here = np.flatnonzero((epochs == epoch) & (counts > 1))
        words = hash_words(rows[here], derive_key("caption", seed, dataset, shard, epoch))
        chosen[here] = ((words >> np.uint64(1)) % counts[here].astype(np.uint64)).astype(np.int64)
    return chosen
