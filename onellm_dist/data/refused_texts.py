"""Saying at the start how many samples have no text for the recipe's format, and why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.data.media_text import get_media_encoder
from onellm_dist.data.pair_text import encode_texts
from onellm_dist.data.retry import read_parts_with_retries
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.token_counts import UNREADABLE, TokenCounts, get_media_names
from onellm_dist.shards.format.dataset import Dataset

MOST_SHARDS = 200
"""Shards that are looked at if a dataset has more: a start must not take minutes."""

log = get_logger(__name__)


def report_refused_texts(datasets: Sequence[Dataset], encoder: TextEncoder, split: str) -> None:
    """Log, for each dataset, how many samples will be skipped for their text; with one reason.

    Args:
        datasets: the datasets, whose token counts are complete.
        encoder: how texts are encoded.
        split: the split that is read.
    """
    token_counts = TokenCounts(datasets, encoder.fingerprint, split, seed=0)
    for number, dataset in enumerate(datasets):
        shards = dataset.shards(split)[:MOST_SHARDS]
        refused, first = 0, None
        for place, shard in enumerate(shards):
            rows = np.arange(shard.samples)
            counts = token_counts.get(number, place, rows, np.zeros_like(rows))
            found = np.flatnonzero((counts == UNREADABLE).all(1))
            refused += len(found)
            if len(found) and first is None:
                first = (shard, int(found[0]))
        if first is None:
            continue
        shard, row = first
        try:
            parts = read_parts_with_retries(dataset, shard, row, TEXT_EXTENSIONS)
            with_media = get_media_encoder(encoder, dataset)
            names = None if with_media is None else get_media_names(dataset, shard, row)
            encode_texts(with_media or encoder, parts, names)
            reason = "its text can be read now"
        except SampleError as error:
            reason = error.what
        log.warning(
            "dataset %s: %d of %d samples%s have no text for data.text_format=%s and will be "
            "skipped; the first: %s",
            dataset.name,
            refused,
            sum(shard.samples for shard in shards),
            f" in its first {MOST_SHARDS} shards" if len(shards) == MOST_SHARDS else "",
            encoder.text_format,
            reason,
        )
