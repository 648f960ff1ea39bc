"""What the page about a dataset shows of its samples: which are drawn, their texts, their pictures."""

from __future__ import annotations

import base64
import io
import json
import random
from bisect import bisect_right
from collections import Counter
from html import escape
from itertools import accumulate

import av
import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.turns import TurnsError, parse_turns
from onellm_dist.modalities import Part, get_modality
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.parts import read_parts

_SHARDS = 200
"""Shards whose indexes are looked at, evenly spread; the page says so where there are more."""
TIMED = frozenset({"mp4", "webm", "mkv", "avi", "mov", "wav", "flac", "mp3", "ogg", "opus", "m4a"})
_CONTAINERS = "mov,mp4,m4a,matroska,webm,avi,ogg,mp3,wav,flac"
"""What FFmpeg may guess: no playlists, which would open other files."""
_WIDTH = 448
"""Pixels of a preview: what the modalities draw."""
_SPEAKERS = {"user": "Q", "assistant": "A", "system": "System"}


class DatasetOverview:
    """What the page needs of a dataset, gathered once."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        shards = [s for split in dataset.splits for s in dataset.shards(split)]
        step = -(-len(shards) // _SHARDS)
        self.all, self.seen = len(shards), shards[::step]
        lengths = list[NDArray[np.uint64]]()
        self.counts = Counter[str]()
        for shard in self.seen:
            index = dataset.index(shard)
            lengths.append(index.all_text_bytes())
            for kind, (count, _) in index.extension_sets().items():
                self.counts.update(dict.fromkeys(kind, count))
        self.lengths = np.concatenate(lengths)
        self._ends = list(accumulate(s.samples for s in self.seen))
        self._draw = random.Random(seed)

    def rows(self, count: int) -> list[tuple[ShardInfo, int]]:
        """Random samples of the shards that were looked at, each once; all, where there are no more."""
        total = self._ends[-1]
        found = []
        for number in self._draw.sample(range(total), min(count, total)):
            shard = bisect_right(self._ends, number)
            found.append((self.seen[shard], number - (self._ends[shard - 1] if shard else 0)))
        return found

    def durations(self, count: int) -> list[float]:
        """Seconds of the sounds and films of `count` random samples."""
        return [
            d
            for s, r in self.rows(count)
            if (d := _seconds(read_parts(self.dataset, s, r))) is not None
        ]


def format_text(parts: dict[str, Part]) -> str:
    """What a sample says, as HTML: its captions, or its conversation with a turn a line."""
    if "txt" in parts:
        return escape(parts["txt"].data.decode(errors="replace"))
    meta = _meta(parts)
    caption = meta.get("caption", meta.get("captions"))
    if isinstance(caption, str):
        return escape(caption)
    if isinstance(caption, list):
        listed = "".join(f"<li>{escape(str(c))}</li>" for c in caption)
        return f'<span class="dim">{len(caption)} captions, one is read in an epoch:</span><ul>{listed}</ul>'
    conversations = meta.get("conversations")
    if not conversations:
        return ""
    try:
        turns = parse_turns(conversations)
    except TurnsError as error:
        return f'<span class="dim">malformed conversations: {escape(str(error))}</span>'
    lines = [f"<b>{_SPEAKERS[turn.role]}:</b> {escape(turn.text)}" for turn in turns]
    return "<br>".join(lines)


def _meta(parts: dict[str, Part]) -> dict[str, object]:
    try:
        value = json.loads(parts["json"].data) if "json" in parts else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _seconds(parts: dict[str, Part]) -> float | None:
    """How long a sample's sound or film is."""
    part = next((p for e, p in parts.items() if e.rsplit(".", 1)[-1] in TIMED), None)
    if part is None:
        return None
    try:
        with av.open(
            io.BytesIO(part.data), "r", options={"format_whitelist": _CONTAINERS}
        ) as container:
            return container.duration / av.time_base if container.duration else None
    except av.FFmpegError:
        return None


def render_text(dataset: Dataset, shard: ShardInfo, row: int) -> str:
    """A sample's text as HTML, or why it cannot be read."""
    try:
        return format_text(read_parts(dataset, shard, row))
    except OneLLMError as error:
        return f'<span class="wrong">cannot be read: {escape(error.what)}</span>'


def render_sample(dataset: Dataset, shard: ShardInfo, row: int) -> str:
    """A figure of one sample: each of its modalities as people look at it, and its text."""
    pictures = []
    try:
        parts = read_parts(dataset, shard, row)
        for name in dataset.modalities:
            modality = get_modality(name)
            slots = {slot: parts[e] for slot, e in modality.match(set(parts)).items()}
            picture = modality.preview(modality.decode(slots, _meta(parts))).convert("RGB")
            picture.thumbnail((_WIDTH, _WIDTH))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=85)
            pictures.append(
                f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
            )
        text = format_text(parts)
    except OneLLMError as error:
        text = f'<span class="wrong">cannot be drawn: {escape(error.what)}</span>'
    key = f"{escape(shard.name)}/{escape(dataset.index(shard).key(row))}"
    return f'<figure>{"".join(pictures)}<figcaption>{text}<div class="key">{key}</div></figcaption></figure>'
