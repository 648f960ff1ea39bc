"""`onellm shards count RECIPE`: what a plan needs, computed beforehand on machines without GPUs.

The tokens of all texts are counted, and it is checked that indexes state the media from which spans
follow. Finished shards are kept: a stopped command resumes, and tasks of an array share the work.
The first start of the run then counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.output import write_output
from onellm_dist.config.load import load_recipe
from onellm_dist.config.schema import DataSection
from onellm_dist.data.corpus import Corpus, open_datasets
from onellm_dist.data.micro_batch import SampleTable
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.token_counts import build_token_counts, find_missing_token_counts
from onellm_dist.data.validation import select_validation_data
from onellm_dist.model.weights.lazy import open_empty_model
from onellm_dist.shards.build.workers import ArrayTask


def count_recipe(
    recipe: Path | str, overrides: Sequence[str], *, workers: int | None, task: str
) -> int:
    """Count the tokens of the texts of a recipe's datasets, those of its validation set too.

    Args:
        recipe: a file, or the name of a recipe that ships.
        overrides: `key=value`, each for one key of the recipe.
        workers: processes; None: one for each CPU that the job has.
        task: INDEX/COUNT, this process's share of the shards.

    Returns:
        The exit code.

    Raises:
        UsageError: the recipe, the model or a dataset cannot be used; see also
            `build_token_counts`.
    """
    share = ArrayTask.parse(task)
    config = load_recipe(recipe, overrides).config
    section = config.model
    model, processor = open_empty_model(
        path=section.path, preset=section.preset, span_positions=section.span_positions
    )
    data, names = config.data, list(model.config.modalities)
    encoder = TextEncoder(
        processor.tokenizer, data.text_format, data.max_text_tokens, pairs=data.preference_pairs
    )
    for part, split in _list_parts(data):
        datasets = open_datasets(part, names, split)
        before = sum(shard.samples for dataset in datasets for shard in dataset.shards(split))
        counted = build_token_counts(
            datasets, encoder, split=split, workers=workers, task=(share.index, share.count)
        )
        left = find_missing_token_counts(datasets, encoder.fingerprint, split)
        write_output(
            f"{split}: {counted} of {format_count(before, 'sample')} counted now; "
            + (
                f"{format_count(len(left), 'shard')} left to other tasks"
                if left
                else "all are counted"
            )
        )
        corpus = Corpus(datasets, part, encoder, config.run.seed, names, split=split)
        for line in _describe_spans(corpus, share):
            write_output(line)
    return EXIT_DONE


def _list_parts(data: DataSection) -> list[tuple[DataSection, str]]:
    """The `data` section and the split of what is trained on, and of the validation set."""
    parts = [(data, "train")]
    if data.validation is not None:
        parts.append((select_validation_data(data), data.validation.split))
    return parts


def _describe_spans(corpus: Corpus, share: ArrayTask) -> list[str]:
    """Mean spans of the samples of varied datasets, of this task's shards.

    Raises:
        UsageError: indexes do not state the media; the datasets are named.
    """
    lines: list[str] = []
    problems: list[UsageError] = []
    for number, dataset in enumerate(corpus.datasets):
        if not corpus.media.varied[number]:
            continue
        total, samples = np.zeros(len(corpus.media.names)), 0
        shards = range(share.index, len(corpus.shards[number]), share.count)
        try:
            for shard in shards:
                rows = np.arange(corpus.shards[number][shard].samples, dtype=np.int64)
                zeros = np.zeros_like(rows)
                table = SampleTable(zeros + number, zeros + shard, rows, zeros, zeros, zeros)
                total += corpus.media.count(table, rows).sum(0)
                samples += len(rows)
        except UsageError as error:
            problems.append(error)
            continue
        means = zip(corpus.media.names, total / max(1, samples), strict=True)
        said = ", ".join(f"{mean:.2f} of {name}" for name, mean in means if mean)
        lines.append(
            f"{dataset.name}: spans a sample: {said or 'none'} ({format_count(samples, 'sample')})"
        )
    if problems:
        raise UsageError(
            "\n".join(p.what for p in problems), problems[0].why, "\n".join(p.do for p in problems)
        )
    return lines
