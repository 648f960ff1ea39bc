"""The validation set: the first samples of another split, in the shares of the mixture.

It is the same for any number of ranks and throughout the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection, ValidationSection
from onellm_dist.data.plan import Plan
from onellm_dist.shards.format.dataset import open_dataset


def open_validation_plan(
    config: DataSection,
    tokenizer: Any,
    seed: int,
    modalities: Sequence[str],
    *,
    build_counts: bool = True,
    sizes: tuple[int, int] | None = None,
) -> Plan:
    """Open a plan whose step 0 is the complete validation set, without augmentation.

    Datasets of the mixture that lack the split are left out.

    Args:
        config: the run's `data` section, with `data.validation`.
        tokenizer: the processor's (fast) tokenizer.
        seed: the run's seed.
        modalities: names of the model's modalities.
        build_counts: False on ranks that wait until another rank has counted tokens.
        sizes: image patches and prefix tokens of the encoder; default: CLIP ViT-L/14's.

    Raises:
        UsageError: no dataset has the split, or one has fewer samples than its share of the set;
            see also `Corpus.open`.
    """
    wanted = config.validation
    section = select_validation_data(config)
    if wanted is None:
        raise ValueError("the recipe has no data.validation")
    plan = Plan.open(
        section,
        tokenizer,
        seed,
        modalities,
        split=wanted.split,
        build_counts=build_counts,
        sizes=sizes,
    )
    _check_dataset_sizes(plan, wanted)
    return plan


def select_validation_data(config: DataSection) -> DataSection:
    """Return the `data` section of a recipe's validation set.

    Raises:
        UsageError: no dataset has the split.
    """
    wanted = config.validation
    if wanted is None:
        raise ValueError("the recipe has no data.validation")
    entries = tuple(
        entry
        for entry in config.mixture
        if wanted.split
        in open_dataset(config.locate(entry), follow_links=config.follow_links).splits
    )
    if not entries:
        raise UsageError(
            f"data.validation.split={wanted.split}: no dataset of the mixture has this split",
            "there is nothing to validate on.",
            "build the datasets with a validation split, use another split, or remove "
            "data.validation.",
        )
    return config.model_copy(
        update={"mixture": entries, "global_batch": wanted.samples, "augment": False}
    )


def _check_dataset_sizes(plan: Plan, wanted: ValidationSection) -> None:
    counts = plan.mixture.count_taken(wanted.samples)
    for dataset, count in zip(plan.corpus.datasets, counts, strict=True):
        present = dataset.samples(wanted.split)
        if count > present:
            raise UsageError(
                f"data.validation.samples={wanted.samples} takes {format_count(count, 'sample')} "
                "of dataset "
                f"{dataset.name}; its split {wanted.split!r} has {present}",
                "samples would count twice.",
                f"set data.validation.samples to {wanted.samples * present // count} or less.",
            )
