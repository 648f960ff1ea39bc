"""How many media and spans each sample has, from the indexes alone.

A dataset of the paper's kind gives every sample the same media with one span each, and nothing is
looked up. Others are *varied*: their samples list their media, or a medium may take several spans
(`data.spans`), which follow from the sizes that the index states. Shapes: M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import UsageError
from onellm_dist.common.media_size import SampleMedium
from onellm_dist.data.micro_batch import SampleRef, SampleTable, group_by_shard
from onellm_dist.data.retry import open_index_with_retries
from onellm_dist.modalities import Modality
from onellm_dist.modalities.spans import share_spans
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.media_columns import MediaColumns

Ints = NDArray[np.int64]


class SpannedMedium(NamedTuple):
    """One medium of a sample, and how many spans it takes."""

    modality: str
    prefix: str
    spans: int


class CorpusMedia:
    """The media of the samples of some datasets.

    Args:
        datasets: the datasets.
        shards: the shards of each.
        modalities: the model's modalities, in span order.
        most: `data.spans`: modality to the most spans that a sample's media of it may take.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        shards: Sequence[Sequence[ShardInfo]],
        modalities: Mapping[str, Modality],
        most: Mapping[str, int],
    ) -> None:
        self._datasets = datasets
        self._shards = shards
        self._modalities = modalities
        self._most = {name: number for name, number in most.items() if number > 1}
        self.varied = np.asarray(
            [d.lists_media or any(m in self._most for m in d.modalities) for d in datasets]
        )
        """[datasets] whether samples of a dataset differ in media or spans."""
        self.names = tuple(modalities)
        """The modalities that `count` counts, in its order."""

    def get(self, ref: SampleRef) -> tuple[SpannedMedium, ...]:
        """Return the media of a sample of a varied dataset, in order.

        Raises:
            UsageError: the index does not list media.
        """
        media = self._open(ref.dataset, ref.shard).get(ref.row)
        return tuple(
            SpannedMedium(medium.modality, medium.prefix, spans)
            for medium, spans in zip(media, self._count_spans(media), strict=True)
        )

    def count(self, table: SampleTable, members: Ints) -> Ints:
        """Count the spans of samples of varied datasets, by modality.

        Args:
            table: samples.
            members: [k] which of them.

        Returns:
            [k, M].

        Raises:
            UsageError: an index does not list media.
        """
        place = {name: i for i, name in enumerate(self.names)}
        counts = np.zeros((len(members), len(place)), dtype=np.int64)
        for here in group_by_shard(table.dataset[members], table.shard[members]):
            first = members[here[0]]
            columns = self._open(int(table.dataset[first]), int(table.shard[first]))
            rows = table.row[members[here]].tolist()
            for i, row in zip(here.tolist(), rows, strict=True):
                media = columns.get(row)
                for medium, spans in zip(media, self._count_spans(media), strict=True):
                    counts[i, place[medium.modality]] += spans
        return counts

    def count_at_most(self, dataset: int, shard: int, rows: Ints) -> Ints:
        """Bound the spans of samples of one shard from above, by modality, without their sizes.

        Args:
            dataset: the varied dataset.
            shard: the shard.
            rows: [k] rows of its index.

        Returns:
            [k, M].

        Raises:
            UsageError: as of `count`.
        """
        columns = self._open(dataset, shard)
        sample = np.repeat(np.arange(len(columns.starts) - 1), np.diff(columns.starts))
        place = np.array([self.names.index(name) for name in columns.modalities], dtype=np.int64)
        counts = np.zeros((len(columns.starts) - 1, len(self.names)), dtype=np.int64)
        np.add.at(counts, (sample, place[columns.modality]), 1)
        most = np.array([self._most.get(name, 1) for name in self.names], dtype=np.int64)
        bound: Ints = np.where(counts > 0, np.maximum(counts, most), 0)[rows]
        return bound

    def _count_spans(self, media: Sequence[SampleMedium]) -> list[int]:
        if not self._most:
            return [1] * len(media)
        return share_spans([(m.modality, m.size) for m in media], self._most, self._modalities)

    def _open(self, number: int, shard: int) -> MediaColumns:
        dataset, info = self._datasets[number], self._shards[number][shard]
        media = open_index_with_retries(dataset, info).media
        if media is None:
            raise UsageError(
                f"dataset {dataset.name}, shard {info.path}: its index does not say which media "
                "its samples have and how large they are",
                "how many spans they take is planned from it"
                + (" (data.spans)." if not dataset.lists_media else "."),
                f"read the headers of the media once: onellm shards index --media "
                f"{dataset.location}",
            )
        unknown = sorted(set(media.modalities) - set(self._modalities))
        if unknown:
            raise UsageError(
                f"dataset {dataset.name}, shard {info.path}: it has media of {', '.join(unknown)}",
                f"the model reads {', '.join(self._modalities)}.",
                "use a model that reads them, or build the dataset without them.",
            )
        return media
