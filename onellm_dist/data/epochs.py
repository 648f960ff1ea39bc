"""Epochs of a mixture: as many samples as all its datasets have together.

The datasets are read by their weights. By weights that are not their sizes, some are read more
often in an epoch than others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from onellm_dist.common.counts import format_count
from onellm_dist.config.schema import DataSection, RunConfig
from onellm_dist.data.mixture import quantise_weights
from onellm_dist.shards.format.dataset import Dataset, open_dataset

SPLIT = "train"


def resolve_epochs(config: RunConfig) -> RunConfig:
    """Replace `train.epochs` by `train.steps`; a recipe that says steps stays as it is.

    Raises:
        UsageError: a dataset cannot be opened.
    """
    epochs = config.train.epochs
    if epochs is None:
        return config
    data = config.data
    datasets = [
        open_dataset(data.locate(entry), follow_links=data.follow_links) for entry in data.mixture
    ]
    samples = sum(dataset.samples(SPLIT) for dataset in datasets)
    # As written: as a float, 1.1 x 100 / 10 lies above 11.
    steps = max(1, math.ceil(Fraction(str(epochs)) * samples / data.global_batch))
    train = config.train.resolve_length(steps)
    return config.model_copy(update={"train": train})


def describe_length(data: DataSection, datasets: Sequence[Dataset], steps: int) -> str:
    """How long a run is in epochs, and how often it reads each dataset, for people.

    Args:
        data: the `data` section.
        datasets: the datasets of its mixture, in its order.
        steps: optimizer steps of the run.
    """
    sizes = [dataset.samples(SPLIT) for dataset in datasets]
    read = steps * data.global_batch
    counts = quantise_weights([entry.weight for entry in data.mixture])
    passes = ", ".join(
        f"{dataset.name} {read * count / sum(counts) / size:.3g}"
        for dataset, size, count in zip(datasets, sizes, counts, strict=True)
        if size
    )
    epochs = f"{read / max(1, sum(sizes)):.3g}"
    return (
        f"length: {format_count(steps, 'step')}, {epochs} {'epoch' if epochs == '1' else 'epochs'} "
        f"of {format_count(sum(sizes), 'sample')}; "
        f"times each dataset is read: {passes}"
    )
