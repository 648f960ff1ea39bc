"""The corpus: the datasets of a recipe, how their texts are encoded, and their modalities.

A corpus says what can be read. The plan (plan.py) says which of it is read in which step; the
reader (reader.py) needs the corpus alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection
from onellm_dist.data.captions import choose_captions
from onellm_dist.data.exclusions import Exclusions
from onellm_dist.data.media import CorpusMedia
from onellm_dist.data.media_text import MediaTextEncoder, get_media_encoder
from onellm_dist.data.micro_batch import SampleRef, SampleTable, group_by_shard
from onellm_dist.data.refused_texts import report_refused_texts
from onellm_dist.data.retry import open_index_with_retries
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.token_counts import (
    TokenCounts,
    build_token_counts,
    find_missing_token_counts,
    get_token_count_path,
)
from onellm_dist.modalities import Modality, get_modality
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset


class Corpus:
    """The datasets of a mixture, with everything that reading a sample depends on.

    Args:
        datasets: the datasets in the order of the mixture, as checked by `open_datasets`.
        config: the run's `data` section.
        text_encoder: tokenizer, text format and maximum text length.
        seed: the run's seed; it chooses among captions and seeds augmentation.
        modalities: names of the model's modalities; those of every dataset are among them.
        split: the split that is read.
        sizes: image patches and prefix tokens of the encoder; default: CLIP ViT-L/14's.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        config: DataSection,
        text_encoder: TextEncoder,
        seed: int,
        modalities: Sequence[str],
        *,
        split: str = "train",
        sizes: tuple[int, int] | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self.config = config
        self.text_encoder = text_encoder
        self.seed = seed
        self.split = split
        in_span_order = sorted(map(get_modality, modalities), key=lambda m: m.order)
        self.modalities: dict[str, Modality] = {
            m.name: m.with_encoder(patches=sizes[0], prefix_tokens=sizes[1]) if sizes else m
            for m in in_span_order
        }
        """The model's modalities by name, in span order."""
        self.shards: list[tuple[ShardInfo, ...]] = [dataset.shards(split) for dataset in datasets]
        """The shards of each dataset; `SampleRef.shard` is an index into them."""
        self.spans: list[tuple[str, ...]] = [
            tuple(m for m in self.modalities if m in dataset.modalities) for dataset in datasets
        ]
        """The modalities of each dataset's samples, in span order; what its samples may have, if
        they list their media."""
        self.media = CorpusMedia(self.datasets, self.shards, self.modalities, config.spans)
        """The media and spans of each sample."""
        self.token_counts = TokenCounts(datasets, text_encoder.fingerprint, split, seed)
        """Text and supervised tokens of every sample."""
        self.exclusions = Exclusions()
        """Samples that are read with zero weight; the trainer sets them before it reads."""

    @classmethod
    def open(
        cls,
        config: DataSection,
        tokenizer: Any,
        seed: int,
        modalities: Sequence[str],
        *,
        split: str = "train",
        build_counts: bool = True,
        show: bool = True,
        sizes: tuple[int, int] | None = None,
    ) -> Corpus:
        """Open the datasets of a recipe, and count the tokens of shards that have no count yet.

        Args:
            config: the run's `data` section.
            tokenizer: the processor's (fast) tokenizer.
            seed: the run's seed.
            modalities: names of the model's modalities.
            split: the split that is read.
            build_counts: False on ranks that wait until another rank has counted; a shard without
                token counts is then an error.
            show: whether to show progress on stderr while tokens are counted.
            sizes: image patches and prefix tokens of the encoder; default: CLIP ViT-L/14's.

        Raises:
            UsageError: something is wrong with the mixture (all problems are listed); see also
                `build_token_counts` and `TextEncoder`.
        """
        if unknown := sorted(set(config.spans) - set(modalities)):
            raise UsageError(
                f"data.spans names {', '.join(unknown)}, which the model does not read",
                f"it reads {', '.join(modalities)}.",
                "name modalities of the model.",
            )
        datasets = open_datasets(config, modalities, split)
        text_encoder = TextEncoder(
            tokenizer, config.text_format, config.max_text_tokens, pairs=config.preference_pairs
        )
        if build_counts:
            build_token_counts(datasets, text_encoder, split=split, show=show)
            report_refused_texts(datasets, text_encoder, split)
        else:
            _require_token_counts(datasets, text_encoder, split)
        return cls(datasets, config, text_encoder, seed, modalities, split=split, sizes=sizes)

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """Every combination of modalities that a sample may have, sorted."""
        found = set[tuple[str, ...]]()
        for dataset, spans in zip(self.datasets, self.spans, strict=True):
            sizes = range(len(spans) + 1) if dataset.lists_media else [len(spans)]
            found.update(c for size in sizes for c in combinations(spans, size))
        return sorted(found)

    def media_encoder(self, number: int) -> MediaTextEncoder | None:
        """Return what encodes a dataset's texts with placeholders; None: `text_encoder` does."""
        return get_media_encoder(self.text_encoder, self.datasets[number])

    def list_spans(self, ref: SampleRef) -> tuple[str, ...]:
        """Return the modality of each span of a sample, as its costs count them."""
        if not self.media.varied[ref.dataset]:
            return self.spans[ref.dataset]
        return tuple(m.modality for m in self.media.get(ref) for _ in range(m.spans))

    def describe_media(self, ref: SampleRef) -> str:
        """Return the media of a sample in words, for messages."""
        if not self.media.varied[ref.dataset]:
            return ", ".join(self.spans[ref.dataset]) or "text"
        spans = [(m.modality, m.spans) for m in self.media.get(ref)]
        return ", ".join(f"{n} in {k} spans" if k > 1 else n for n, k in spans) or "text"

    def shard_of(self, ref: SampleRef) -> tuple[Dataset, ShardInfo]:
        """Return the dataset and the shard that hold a sample."""
        return self.datasets[ref.dataset], self.shards[ref.dataset][ref.shard]

    def sample_id(self, ref: SampleRef) -> str:
        """Return a sample's id, `dataset/shard-name/key@epoch`."""
        dataset, shard = self.shard_of(ref)
        key = open_index_with_retries(dataset, shard).key(ref.row)
        return f"{dataset.name}/{shard.name}/{key}@{ref.epoch}"

    def sample_ids(self, refs: Sequence[SampleRef]) -> list[str]:
        """Return the id of each sample, opening the index of every shard once."""
        ids = [""] * len(refs)
        for i in sorted(range(len(refs)), key=refs.__getitem__):
            ids[i] = self.sample_id(refs[i])
        return ids

    def table_ids(self, table: SampleTable) -> list[str]:
        """Return the id of each sample of a table, opening the index of every shard once."""
        ids = [""] * len(table.dataset)
        for here in group_by_shard(table.dataset, table.shard):
            number = int(table.dataset[here[0]])
            dataset, shard = self.datasets[number], self.shards[number][int(table.shard[here[0]])]
            index = open_index_with_retries(dataset, shard)
            rows, epochs = table.row[here].tolist(), table.epoch[here].tolist()
            for i, row, epoch in zip(here.tolist(), rows, epochs, strict=True):
                ids[i] = f"{dataset.name}/{shard.name}/{index.key(row)}@{epoch}"
        return ids

    def caption_index(self, ref: SampleRef, count: int) -> int:
        """Return which of its `count` captions a sample is read with in its epoch."""
        one = np.ones(1, dtype=np.int64)
        dataset, shard = self.shard_of(ref)
        chosen = choose_captions(
            self.seed, dataset.name, shard.name, one * ref.row, one * ref.epoch, one * count
        )
        return int(chosen[0])


def open_datasets(
    config: DataSection, modalities: Sequence[str], split: str = "train"
) -> list[Dataset]:
    """Open and check the datasets of a mixture.

    Raises:
        UsageError: a dataset is missing, empty or repeated, lacks the split, or has a modality
            that the model does not have; or a weight is not a number. All problems are listed.
    """
    problems: list[UsageError] = []
    datasets: list[Dataset] = []
    for entry in config.mixture:
        try:
            dataset = open_dataset(config.locate(entry), follow_links=config.follow_links)
            _check_dataset(dataset, entry.weight, modalities, split, datasets)
            datasets.append(dataset)
        except UsageError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError(
            f"{format_count(len(problems), 'problem')} in data.mixture\n"
            + "\n".join(f"  - {p.what} {p.do}" for p in problems),
            "nothing was started.",
            "fix data.root and data.mixture in the recipe, or the datasets.",
        )
    return datasets


def _check_dataset(
    dataset: Dataset,
    weight: float,
    modalities: Sequence[str],
    split: str,
    before: Sequence[Dataset],
) -> None:
    if not math.isfinite(weight):
        raise UsageError(
            f"dataset {dataset.location}: weight {weight} is not a finite number",
            "the dataset's share of the samples cannot be computed.",
            "use a number above 0.",
        )
    unknown = [name for name in dataset.modalities if name not in modalities]
    if unknown:
        raise UsageError(
            f"dataset {dataset.location} has modality {', '.join(unknown)}; "
            f"the model has {', '.join(modalities) or 'none'}",
            "the model has no tokenizer for it.",
            "remove the dataset from data.mixture, or use a model with this modality.",
        )
    if not sum(shard.samples for shard in dataset.shards(split)):
        raise UsageError(
            f"dataset {dataset.location}: its split {split!r} is empty",
            "there is nothing to read.",
            "build the dataset again, or remove it from data.mixture.",
        )
    twin = next((other for other in before if other.name == dataset.name), None)
    if twin is not None:
        raise UsageError(
            f"datasets {twin.location} and {dataset.location} have the same name, {dataset.name!r}",
            "sample ids, orders and digests depend on the name, so both would give the same.",
            "list a dataset once, with the sum of the weights; or build one of them under "
            "another name.",
        )


def _require_token_counts(
    datasets: Sequence[Dataset], text_encoder: TextEncoder, split: str
) -> None:
    missing = find_missing_token_counts(datasets, text_encoder.fingerprint, split)
    if missing:
        dataset, shard = missing[0]
        raise UsageError(
            f"{get_token_count_path(dataset, shard, text_encoder.fingerprint)}: no such file "
            f"({format_count(len(missing), 'shard')} without token counts)",
            "plans are computed from them.",
            "let rank 0 count first, on a disk that all ranks share (set ONELLM_CACHE if the "
            "dataset is read-only).",
        )
