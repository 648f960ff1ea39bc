"""Entries of lists of excluded samples that leave nothing out, and what they may have meant."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from onellm_dist.data.exclusions import SHOWN
from onellm_dist.shards.format.dataset import Dataset, ShardInfo

_EPOCH = re.compile(r"@[0-9]+$")


@dataclass(frozen=True)
class UnusedEntries:
    """The entries that leave nothing out of a run.

    Attributes:
        other_datasets: dataset that the run does not read -> how many entries name it.
        unmatched: entries of the run's datasets that name no sample and no shard that it reads.
        similar: entry or dataset -> a name like it that exists; of the first few.
    """

    other_datasets: dict[str, int] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    similar: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Describe both kinds of entries; "" where every entry leaves something out."""
        texts: list[str] = []
        if self.other_datasets:
            count = sum(self.other_datasets.values())
            texts.append(
                f"{count} of them {'names' if count == 1 else 'name'} datasets that this run does "
                f"not read: {self._list(self.other_datasets)}"
            )
        if self.unmatched:
            count = len(self.unmatched)
            texts.append(
                f"{count} of them {'names' if count == 1 else 'name'} no sample and no shard that "
                f"this run reads: {self._list(self.unmatched)}"
            )
        return "; ".join(texts)

    def _list(self, names: Iterable[str]) -> str:
        found = list(names)
        shown = [
            f"{name} (did you mean {self.similar[name]}?)" if name in self.similar else name
            for name in found[:SHOWN]
        ]
        return ", ".join(shown) + (" ..." if len(found) > SHOWN else "")


class _Readings:
    """What a run reads: its datasets, their shards, and the keys of the shards that are asked for.

    Args:
        corpora: datasets and the shards that are read of each.
    """

    def __init__(
        self, corpora: Iterable[tuple[Sequence[Dataset], Sequence[Sequence[ShardInfo]]]]
    ) -> None:
        self._datasets: dict[str, Dataset] = {}
        self._shards: dict[str, dict[str, ShardInfo]] = {}
        self._keys: dict[tuple[str, str], frozenset[str]] = {}
        for datasets, shards in corpora:
            for dataset, own in zip(datasets, shards, strict=True):
                self._datasets[dataset.name] = dataset
                self._shards.setdefault(dataset.name, {}).update({s.name: s for s in own})

    def has_dataset(self, name: str) -> bool:
        return name in self._datasets

    def has(self, entry: str) -> bool:
        """Whether an entry of one of the datasets names a shard, a sample or a use of one."""
        dataset, shard, *rest = entry.split("/", 2)
        if shard not in self._shards[dataset]:
            return False
        keys = self._list_keys(dataset, shard) if rest else frozenset[str]()
        return not rest or rest[0] in keys or _EPOCH.sub("", rest[0]) in keys

    def find_similar_dataset(self, name: str) -> str | None:
        """A dataset with a similar name, or the one that has a shard of this name."""
        for dataset, shards in self._shards.items():
            if name in shards:
                return f"{dataset}/{name}"
        return _find_similar(name, self._datasets)

    def find_similar(self, entry: str) -> str | None:
        """An entry like one that names nothing in a dataset of the run."""
        dataset, shard, *rest = entry.split("/", 2)
        if shard not in self._shards[dataset]:
            near = _find_similar(shard, self._shards[dataset])
            return near and "/".join((dataset, near, *rest))
        near = _find_similar(_EPOCH.sub("", rest[0]), sorted(self._list_keys(dataset, shard)))
        return near and f"{dataset}/{shard}/{near}"

    def _list_keys(self, dataset: str, shard: str) -> frozenset[str]:
        if (dataset, shard) not in self._keys:
            index = self._datasets[dataset].index(self._shards[dataset][shard])
            self._keys[dataset, shard] = frozenset(index.keys())
        return self._keys[dataset, shard]


def find_unused_entries(
    entries: Iterable[str],
    corpora: Iterable[tuple[Sequence[Dataset], Sequence[Sequence[ShardInfo]]]],
) -> UnusedEntries:
    """The entries that leave nothing out of a run.

    Args:
        entries: of all lists.
        corpora: of the training and the validation data, the datasets and the shards read of each.
    """
    readings = _Readings(corpora)
    others: Counter[str] = Counter()
    unmatched: list[str] = []
    for entry in entries:
        name = entry.split("/", 1)[0]
        if not readings.has_dataset(name):
            others[name] += 1
        elif not readings.has(entry):
            unmatched.append(entry)
    return UnusedEntries(dict(others), unmatched, dict(_list_similar(readings, others, unmatched)))


def _list_similar(
    readings: _Readings, datasets: Iterable[str], entries: Sequence[str]
) -> Iterator[tuple[str, str]]:
    for name in list(datasets)[:SHOWN]:
        if near := readings.find_similar_dataset(name):
            yield name, near
    for entry in entries[:SHOWN]:
        if near := readings.find_similar(entry):
            yield entry, near


def _find_similar(name: str, known: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name, known, n=1)
    return found[0] if found else None
