"""The samples on the page about a dataset: which are drawn, their texts, their pictures."""

from __future__ import annotations

import base64
import io
import json
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.media_size import SampleMedium
from onellm_dist.common.turns import PAIR_KEYS, TurnsError, parse_conversations
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities import Part, all_modalities, get_modality
from onellm_dist.modalities.io.containers import measure_duration
from onellm_dist.modalities.io.sounds import AUDIO_EXTENSIONS
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.media import get_medium_meta, get_medium_parts
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.tools.safe_decoding import Row, map_rows

_SHARDS = 200
"""Most shards whose indexes are read, evenly spread; the page says so if there are more."""
TIMED = frozenset({"mp4", "webm", "mkv", "avi", "mov", *AUDIO_EXTENSIONS})
_WIDTH = 448
"""Pixels of the longer side of a preview, which is what the modalities draw."""
_SPEAKERS = {"user": "Q", "assistant": "A", "system": "System"}


class DatasetOverview:
    """What the page needs to know of a dataset, gathered once from its indexes.

    Args:
        dataset: an open dataset.
        seed: seed of the random samples.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        shards = [s for split in dataset.splits for s in dataset.shards(split)]
        step = -(-len(shards) // _SHARDS)
        self.shard_count = len(shards)
        self.shards = shards[::step]
        """The shards whose indexes were read."""
        text_bytes = list[NDArray[np.uint64]]()
        self.counts = Counter[str]()
        """Extension to the number of samples that have it."""
        for shard in self.shards:
            index = dataset.index(shard)
            text_bytes.append(index.all_text_bytes())
            for extensions, (count, _) in index.extension_sets().items():
                self.counts.update(dict.fromkeys(extensions, count))
        self.text_bytes = np.concatenate(text_bytes)
        self._ends = list(accumulate(s.samples for s in self.shards))
        self._draw = random.Random(seed)

    def draw_rows(self, count: int) -> list[tuple[ShardInfo, int]]:
        """Draw random samples, each once; all samples if there are no more than `count`."""
        total = self._ends[-1]
        found = []
        for number in self._draw.sample(range(total), min(count, total)):
            shard = bisect_right(self._ends, number)
            first = self._ends[shard - 1] if shard else 0
            found.append((self.shards[shard], number - first))
        return found

    def measure_durations(self, count: int) -> list[float]:
        """Measure the sounds and films of `count` random samples, in seconds."""
        rows = self.draw_rows(count)
        found = map_rows(self.dataset, rows, _measure_duration, lambda *_: None)
        return [duration for duration in found if duration is not None]


def format_text(parts: dict[str, Part]) -> str:
    """Format a sample's captions, or its conversation with a turn a line, as HTML."""
    if "txt" in parts:
        return escape(parts["txt"].data.decode(errors="replace"))
    meta = _parse_meta(parts)
    caption = meta.get("caption", meta.get("captions"))
    if isinstance(caption, str):
        return escape(caption)
    if isinstance(caption, list):
        listed = "".join(f"<li>{escape(str(c))}</li>" for c in caption)
        head = f'<span class="dim">{len(caption)} captions, of which an epoch reads one:</span>'
        return f"{head}<ul>{listed}</ul>"
    try:
        found = parse_conversations(meta, all_modalities())
    except TurnsError as error:
        return f'<span class="dim">malformed conversations: {escape(str(error))}</span>'
    lines = []
    for name, turns in zip(PAIR_KEYS if len(found) == 2 else [""], found, strict=False):
        lines += [f'<span class="dim">{name}:</span>'] * bool(name)
        lines += [f"<b>{_SPEAKERS[turn.role]}:</b> {escape(turn.text)}" for turn in turns]
    return "<br>".join(lines)


def _parse_meta(parts: dict[str, Part]) -> dict[str, object]:
    try:
        value = json.loads(parts["json"].data) if "json" in parts else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _measure_duration(dataset: Dataset, shard: ShardInfo, row: int) -> float | None:
    """Measure a sample's sound or film, in seconds; None: it has none, or cannot be opened."""
    parts = read_parts(dataset, shard, row)
    part = next((p for e, p in parts.items() if e.rsplit(".", 1)[-1] in TIMED), None)
    if part is None:
        return None
    with decoding():
        return measure_duration(part)


def find_media_faults(dataset: Dataset, rows: Sequence[Row]) -> list[list[str]]:
    """Decode the media of some samples; list for each why those that cannot be decoded cannot."""
    found = map_rows(
        dataset, rows, _find_faults, lambda *refused: [f"cannot be decoded: {refused[-1]}"]
    )
    return list(found)


def _find_faults(dataset: Dataset, shard: ShardInfo, row: int) -> list[str]:
    faults = []
    try:
        parts = read_parts(dataset, shard, row)
    except OneLLMError as error:
        return [f"cannot be read: {error.what}", error.do]
    for number, medium in enumerate(_list_media(dataset, shard, row)):
        modality = get_modality(medium.modality)
        try:
            with decoding():
                meta = _parse_meta(parts)
                own = get_medium_meta(meta, number) if medium.prefix else meta
                modality.decode(get_medium_parts(medium, parts), own)
        except OneLLMError as error:
            which = f"{medium.modality} {medium.prefix}".strip()
            faults.append(f"{which} cannot be decoded: {error.what}")
    return faults


def _list_media(dataset: Dataset, shard: ShardInfo, row: int) -> Sequence[SampleMedium]:
    """The media of a sample: those that the index lists, or what every sample has."""
    if not dataset.lists_media:
        return [SampleMedium(name) for name in dataset.modalities]
    media = dataset.index(shard).media
    return media.get(row) if media is not None else ()


def render_text(dataset: Dataset, shard: ShardInfo, row: int) -> str:
    """Format a sample's text as HTML, or why it cannot be read."""
    try:
        return format_text(read_parts(dataset, shard, row))
    except OneLLMError as error:
        return f'<span class="wrong">cannot be read: {escape(error.what)}</span>'


def render_samples(dataset: Dataset, rows: Sequence[Row]) -> str:
    """Make the HTML figures of samples: a picture of each of their modalities, and their text."""
    return "".join(map_rows(dataset, rows, _render_sample, _render_refused))


def _render_sample(dataset: Dataset, shard: ShardInfo, row: int) -> str:
    try:
        parts = read_parts(dataset, shard, row)
        with decoding():
            media = enumerate(_list_media(dataset, shard, row))
            pictures = [_draw(medium, number, parts) for number, medium in media]
        return _make_figure(dataset, shard, row, "".join(pictures), format_text(parts))
    except OneLLMError as error:
        return _render_refused(dataset, shard, row, error.what)


def _render_refused(dataset: Dataset, shard: ShardInfo, row: int, reason: str) -> str:
    text = f'<span class="wrong">cannot be drawn: {escape(reason)}</span>'
    return _make_figure(dataset, shard, row, "", text)


def _draw(medium: SampleMedium, number: int, parts: dict[str, Part]) -> str:
    """Draw one medium, as an HTML image."""
    name = medium.modality
    modality = get_modality(name)
    meta = _parse_meta(parts)
    own = get_medium_meta(meta, number) if medium.prefix else meta
    raw = modality.read_raw(get_medium_parts(medium, parts), own)
    modality.make_value(raw, train=False, rng=np.random.default_rng(0))  # or it is refused
    picture = modality.preview(raw).convert("RGB")
    picture.thumbnail((_WIDTH, _WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{data}">'


def _make_figure(dataset: Dataset, shard: ShardInfo, row: int, pictures: str, text: str) -> str:
    key = f"{escape(shard.name)}/{escape(dataset.index(shard).key(row))}"
    caption = f'<figcaption>{text}<div class="key">{key}</div></figcaption>'
    return f"<figure>{pictures}{caption}</figure>"
