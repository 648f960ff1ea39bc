"""`onellm shards stats` and `preview`: one static HTML page about a dataset; everything inline, nothing fetched."""

from __future__ import annotations

import base64
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from onellm_dist.errors import EXIT_DONE, SampleError, UsageError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.shards.files import write_whole
from onellm_dist.shards.format import Dataset, ShardInfo, open_dataset
from onellm_dist.shards.index import read_parts
from onellm_dist.shards.staging import QUARANTINE

_SHARDS = 200
"""Shards whose indexes are looked at, evenly spread; the page says so where there are more."""
_PROBED = 200
"""Samples whose duration is measured."""
_EXAMPLES = 20
_BINS = 30
_TIMED = frozenset({"mp4", "webm", "mkv", "avi", "mov", "wav", "flac", "mp3", "ogg", "opus", "m4a"})
_CONTAINERS = "mov,mp4,m4a,matroska,webm,avi,ogg,mp3,wav,flac"
"""What FFmpeg may guess: no playlists, which would open other files."""
_WIDTH = 320
"""Pixels of a preview."""
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1d2733;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem}table{border-collapse:collapse}
td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e3e7ec}td.n,th.n{text-align:right}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:1rem}figure{margin:0}
img{max-width:100%;display:block;background:#eef1f4}figcaption{font-size:.85rem}.key{color:#66788a;font-size:.75rem;word-break:break-all}
svg text{font:11px system-ui,sans-serif;fill:#52616f}rect{fill:#2f6f9f}
"""


def histogram(values: Sequence[float] | NDArray[np.generic], unit: str) -> str:
    """An SVG histogram with its least, median and greatest value."""
    data = np.asarray(values, float)
    if not data.size:
        return "<p>no values</p>"
    counts, edges = np.histogram(data, bins=_BINS)
    width, height, top = 640, 140, max(1, int(counts.max()))
    bars = []
    for i, count in enumerate(counts.tolist()):
        tall = height * count / top
        label = f"{edges[i]:.4g} to {edges[i + 1]:.4g} {unit}: {count}"
        bars.append(
            f'<rect x="{i * width / _BINS:.1f}" y="{height - tall:.1f}" width="{width / _BINS - 1:.1f}" height="{tall:.1f}">'
            f"<title>{label}</title></rect>"
        )
    middle = f"median {np.median(data):.4g}, mean {data.mean():.4g}"
    text = escape(f"{data.size} values, least {data.min():.4g}, {middle}, greatest {data.max():.4g} {unit}")
    left = f'<text x="0" y="{height + 14}">{edges[0]:.4g}</text>'
    right = f'<text x="{width}" y="{height + 14}" text-anchor="end">{edges[-1]:.4g}</text>'
    svg = f'<svg viewBox="0 0 {width} {height + 18}" width="{width}" role="img" aria-label="{text}">'
    return f"{svg}{''.join(bars)}{left}{right}</svg><p>{text}</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(value: object, tag: str = "td") -> str:
        number = ' class="n"' if isinstance(value, int) else ""
        return f"<{tag}{number}>{f'{value:,}' if isinstance(value, int) else escape(str(value))}</{tag}>"

    body = "".join(f"<tr>{''.join(cell(v) for v in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(cell(h, 'th') for h in head)}</tr>{body}</table>"


class _Look:
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
            for kind, (count, _) in index.kinds().items():
                self.counts.update(dict.fromkeys(kind, count))
        self.lengths = np.concatenate(lengths)
        self._draw = random.Random(seed)

    def rows(self, count: int) -> list[tuple[ShardInfo, int]]:
        """Random samples of the shards that were looked at."""
        shards = self._draw.choices(self.seen, [s.samples for s in self.seen], k=count)
        return list(dict.fromkeys((s, self._draw.randrange(s.samples)) for s in shards))


def _text(parts: dict[str, Part]) -> str:
    """What a sample says: its caption, or its conversation."""
    if "txt" in parts:
        return parts["txt"].data.decode(errors="replace")
    meta = _meta(parts)
    if isinstance(meta.get("caption"), str):
        return str(meta["caption"])
    turns = meta.get("conversations")
    return "\n".join(f"{t.get('from')}: {t.get('value')}" for t in turns if isinstance(t, dict)) if isinstance(turns, list) else ""


def _meta(parts: dict[str, Part]) -> dict[str, object]:
    try:
        value = json.loads(parts["json"].data) if "json" in parts else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _seconds(parts: dict[str, Part]) -> float | None:
    """How long a sample's sound or film is."""
    part = next((p for e, p in parts.items() if e.rsplit(".", 1)[-1] in _TIMED), None)
    if part is None:
        return None
    try:
        with av.open(io.BytesIO(part.data), "r", options={"format_whitelist": _CONTAINERS}) as container:
            return container.duration / av.time_base if container.duration else None
    except av.FFmpegError:
        return None


def _drawn(dataset: Dataset, shard: ShardInfo, row: int) -> str:
    """A figure of one sample: each of its modalities as people look at it, and its text."""
    key = dataset.index(shard).key(row)
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
            pictures.append(f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
        text = _text(parts)
    except SampleError as error:
        text = f"cannot be drawn: {error.what}"
    caption = f'{escape(text)}<div class="key">{escape(shard.name)}/{escape(key)}</div>'
    return f"<figure>{''.join(pictures)}<figcaption>{caption}</figcaption></figure>"


def _quarantine(root: Path) -> str:
    """Reasons with their numbers, from the file that the builder wrote."""
    path = root / QUARANTINE
    if not path.is_file():
        return "<p>No sample was left out as bad.</p>"
    kinds: Counter[str] = Counter()
    with path.open(encoding="ascii") as file:
        kinds.update(json.loads(line)["reason"].split(":")[0] for line in file)
    return _table(("reason", "samples"), kinds.most_common())


def page(root: Path, *, previews: int, seed: int = 0) -> str:
    """The page's HTML.

    Args:
        root: a dataset's folder.
        previews: samples that are drawn; 0: none.
        seed: which examples are shown.

    Raises:
        UsageError: there is no dataset.
    """
    dataset = open_dataset(root)
    look = _Look(dataset, seed)
    manifest = dataset.manifest
    about = [
        ("modalities", ", ".join(dataset.modalities) or "text alone"), ("text", ", ".join(manifest.text) or "not in every sample"),
        ("licence", manifest.licence), ("source", manifest.source), ("shards", look.all),
    ]  # fmt: skip
    splits = [(s, len(dataset.shards(s)), dataset.samples(s), sum(i.bytes for i in dataset.shards(s))) for s in dataset.splits]
    part = f" ({len(look.seen)} of {look.all} shards, evenly spread)" if len(look.seen) < look.all else ""
    html = [f"<h1>{escape(dataset.name)}</h1>", _table(("", ""), about)]
    html += ["<h2>Splits</h2>", _table(("split", "shards", "samples", "bytes"), splits)]
    html += [f"<h2>Parts{part}</h2>", _table(("part", "samples that have it"), sorted(look.counts.items()))]
    html += [f"<h2>Length of the texts{part}</h2>", histogram(look.lengths, "bytes")]
    examples = [(s, r, read_parts(dataset, s, r)) for s, r in look.rows(_EXAMPLES)]
    if any(e.rsplit(".", 1)[-1] in _TIMED for e in look.counts):
        durations = [d for s, r in look.rows(_PROBED) if (d := _seconds(read_parts(dataset, s, r))) is not None]
        html += [f"<h2>Duration ({len(durations)} samples drawn at random)</h2>", histogram(durations, "s")]
    html += ["<h2>Texts</h2>", _table(("sample", "text"), [(f"{s.name}/{dataset.index(s).key(r)}", _text(p)) for s, r, p in examples])]
    html += ["<h2>Quarantine</h2>", _quarantine(root)]
    if previews:
        html += ["<h2>Samples</h2>", f'<div class="grid">{"".join(_drawn(dataset, s, r) for s, r in look.rows(previews))}</div>']
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(dataset.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>{"".join(html)}</body></html>\n'
    )


def page_command(root: Path, out: Path, *, previews: int, seed: int) -> int:
    """`onellm shards stats` (`previews` 0) and `onellm shards preview`. Returns the exit code.

    Raises:
        UsageError: there is no dataset, or the page cannot be written.
    """
    html = page(root, previews=previews, seed=seed)
    try:
        write_whole(out, html.encode())
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}.", "the page cannot be written.", "choose another --out.") from error
    print(f"{out}: {len(html):,} bytes; open it in a browser")
    return EXIT_DONE
