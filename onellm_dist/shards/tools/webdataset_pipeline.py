"""A dataset as a plain `webdataset` pipeline, for code that reads WebDataset.

Training here reads samples by byte range through the indexes, in an exact global order. This
pipeline reads tars from start to end instead, as WebDataset does, and keeps none of those promises
beyond "each sample once an epoch". Importing this module imports webdataset (1.0.2 or newer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import webdataset as wds
from webdataset.compat import FluidInterface
from webdataset.filters import pipelinefilter
from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset


class ShardPipeline(wds.DataPipeline, FluidInterface):  # type: ignore[misc]  # it is untyped
    """A `webdataset` pipeline with the usual methods (`decode`, `map`, `to_tuple`, ...)."""


class ShardOpener:
    """Opens the tar of each shard, on a local disk or in a remote store.

    Args:
        dataset: the dataset that the shards belong to.
        handler: called with an error; True skips the shard, False ends the epoch.
    """

    def __init__(self, dataset: Dataset, handler: Callable[[Exception], bool]) -> None:
        self.dataset = dataset
        self.handler = handler

    def get_url(self, shard: ShardInfo) -> str:
        """Return the path or URL of a shard's tar."""
        return f"{self.dataset.location}/{shard.path}"

    def __call__(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield each shard with its open stream, and close the stream afterwards."""
        for shard in shards:
            url = shard["url"]
            try:
                stream = self._open(url.removeprefix(f"{self.dataset.location}/"))
            except OSError as error:
                failure = OneLLMError(
                    f"{url}: {error.strerror or error}.",
                    "its samples cannot be read.",
                    "check that the file exists and is readable.",
                )
                failure.__cause__ = error
                if self.handler(failure):
                    continue
                return
            with stream:
                yield {"url": url, "stream": stream}

    def _open(self, path: str) -> IO[bytes]:
        if self.dataset.remote is not None:
            return self.dataset.remote.open(path)
        return (self.dataset.root / path).open("rb")


def _is_visible(name: str) -> bool:
    """Check whether a member of a tar belongs to the dataset, as for the index."""
    return not has_hidden_part(name)


def as_webdataset(
    dataset: Dataset | Path | str,
    *,
    split: str = "train",
    shuffle: int = 0,
    seed: int = 0,
    handler: Callable[[Exception], bool] = reraise_exception,
    follow_links: bool = False,
) -> ShardPipeline:
    """Return a `webdataset` pipeline over one split of a dataset, local or remote.

    A sample is a dict with `__key__`, `__url__`, and the bytes of each part under its extension
    (`jpg`, `txt`, `json`, ...). The pipeline is a torch IterableDataset and has webdataset's
    methods:

        pipeline = as_webdataset("photo_shards", shuffle=1000).decode("pil").to_tuple("jpg", "txt")
        loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=4)

    Shards are distributed over the ranks of torch.distributed and over the workers of a DataLoader,
    so all of them together read each sample once an epoch. A worker beyond the number of shards
    reads nothing. Shuffling gives another order in each epoch of the same iterator object, so in a
    DataLoader set `persistent_workers=True`, or pass another `seed` for each epoch.

    Args:
        dataset: an open dataset, or the path or URL of one.
        split: the split to read.
        shuffle: samples in the shuffle buffer of each worker; the shards are then shuffled too. 0:
            the order of the manifest and of the tars.
        seed: seed of the shuffling; it must be the same on all ranks.
        handler: webdataset's error handler, called with an error; True skips what is at fault,
            False ends the epoch. Default: raise the error.
        follow_links: whether its files may be links that lead out of the folder.

    Raises:
        UsageError: there is no dataset, it has no such split, or `shuffle` is negative.
    """
    if shuffle < 0:
        raise UsageError(
            f"shuffle={shuffle} is negative.",
            "it is a number of samples in a buffer.",
            "give 0 for no shuffling, or some thousand samples.",
        )
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset, follow_links=follow_links)
    opener = ShardOpener(dataset, handler)
    urls = [opener.get_url(shard) for shard in dataset.shards(split)]
    expand = pipelinefilter(tar_file_expander)
    group = pipelinefilter(group_by_keys)
    # Shards are shuffled before they are distributed, with one seed, so that all ranks and workers
    # take theirs from the same list.
    return ShardPipeline(
        wds.SimpleShardList(urls),
        wds.detshuffle(len(urls), len(urls), seed=seed) if shuffle else None,
        wds.split_by_node,
        wds.split_by_worker,
        opener,
        expand(handler=handler, select_files=_is_visible),
        group(handler=handler),
        wds.detshuffle(shuffle, min(shuffle, 100), seed=seed) if shuffle else None,
    )
