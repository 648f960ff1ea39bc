"""The validation set: the first samples of another split, in the shares of the mixture, the same for every world and all along the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection, ValidationSection
from onellm_dist.data.plan import Plan
from onellm_dist.shards.format.dataset import open_dataset


def open_validation(
    config: DataSection,
    tokenizer: Any,
    seed: int,
    modalities: Sequence[str],
    *,
    build_counts: bool = True,
    sizes: tuple[int, int] | None = None,
) -> Plan:
    """A plan whose step 0 is the whole validation set of `data.validation`, in packed micro-batches, without augmentation.

    Datasets of the mixture that do not have the split are left out.

    Raises:
        UsageError: no dataset has the split, or one has fewer samples than its share of the set; see also `Plan.open`.
    """
    wanted = config.validation
    if wanted is None:
        raise ValueError("the recipe has no data.validation")
    entries = tuple(
        entry
        for entry in config.mixture
        if wanted.split in open_dataset(config.locate(entry)).splits
    )
    if not entries:
        raise UsageError(
            f"data.validation.split={wanted.split}: no dataset of the mixture has this split",
            "there is nothing to validate on.",
            "build the datasets with a validation split, name another one, or take data.validation out.",
        )
    section = config.model_copy(
        update={"mixture": entries, "global_batch": wanted.samples, "augment": False}
    )
    plan = Plan.open(
        section,
        tokenizer,
        seed,
        modalities,
        split=wanted.split,
        build_counts=build_counts,
        sizes=sizes,
    )
    _check_sizes(plan, wanted)
    return plan


def _check_sizes(plan: Plan, wanted: ValidationSection) -> None:
    counts = plan.mixture.taken(wanted.samples)
    for dataset, count in zip(plan.corpus.datasets, counts, strict=True):
        there = dataset.samples(wanted.split)
        if count > there:
            raise UsageError(
                f"data.validation.samples={wanted.samples} takes {count} samples of dataset {dataset.name}; "
                f"its split {wanted.split!r} has {there}",
                "samples would count twice.",
                f"set data.validation.samples to {wanted.samples * there // count} or less.",
            )
