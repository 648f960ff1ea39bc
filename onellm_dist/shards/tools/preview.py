"""`onellm shards stats` and `preview`: one static HTML page about a dataset; everything inline, nothing fetched."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.html.charts import choose_ticks, format_short
from onellm_dist.common.html.page import build_html_page, build_html_table, write_page
from onellm_dist.modalities import get_modality
from onellm_dist.shards.build.finish import STATISTICS
from onellm_dist.shards.build.staging import QUARANTINE
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.names import get_modality_parts
from onellm_dist.shards.tools.preview_samples import TIMED, DatasetOverview, render_sample, render_text

_PROBED = 200
"""Samples whose duration is measured."""
_EXAMPLES = 20
_BINS = 40
_WIDEST = 48
"""Pixels of a bar, where there are few."""
_STYLE = """
h1{margin-bottom:.2rem}.lead{font-size:1.05rem;margin-top:0}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1.4rem 1rem}figure{margin:0}
img{max-width:100%;display:block;background:var(--soft);margin-bottom:.3rem}figcaption{font-size:.85rem;overflow-wrap:anywhere}
figcaption ul,td ul{margin:.1rem 0;padding-left:1.1rem}.key{color:var(--dim);font-size:.75rem}rect{fill:#4477aa}
svg.histogram{max-width:720px;display:block}
"""
_TEXT_PARTS = {
    "txt": "the caption",
    "json": "captions or a conversation, and what else the source says of the sample",
}


def draw_histogram(values: Sequence[float] | NDArray[np.generic], unit: str) -> str:
    """An SVG histogram with scales on both axes, and a line with the least, median, mean and greatest value.

    Whole numbers that are few have a bar each.
    """
    data = np.asarray(values, float)
    if not data.size:
        return "<p>no values</p>"
    low, high = float(data.min()), float(data.max())
    whole = bool((data == data.round()).all()) and high - low < _BINS
    edges = np.arange(low - 0.5, high + 1.5) if whole else np.histogram_bin_edges(data, bins=_BINS)
    counts = np.histogram(data, bins=edges)[0]
    left, right, width, height, top = 56, 14, 720, 170, max(1, int(counts.max()))
    floor = height - 36

    def across(value: float) -> float:
        return left + (value - edges[0]) / (edges[-1] - edges[0]) * (width - left - right)

    def up(count: float) -> float:
        return floor - (floor - 10) * count / top

    middle = f"median {np.median(data):.4g}, mean {data.mean():.4g}"
    text = escape(f"{data.size:,} values, least {low:.4g}, {middle}, greatest {high:.4g} {unit}")
    svg = [f'<svg class="histogram" viewBox="0 0 {width} {height}" role="img" aria-label="{text}">']
    for tick in (t for t in choose_ticks(0, top, 3) if t == int(t)):
        svg.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        )
        svg.append(
            f'<text x="{left - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{format_short(tick)}</text>'
        )
    for i, count in enumerate(counts.tolist()):
        start, end = across(float(edges[i])), across(float(edges[i + 1]))
        start, end = max(start, (start + end - _WIDEST) / 2), min(end, (start + end + _WIDEST) / 2)
        label = f"{edges[i]:.4g} to {edges[i + 1]:.4g} {escape(unit)}: {count}"
        svg.append(
            f'<rect x="{start:.1f}" y="{up(count):.1f}" width="{max(1.0, end - start - 1):.1f}" height="{floor - up(count):.1f}">'
            f"<title>{label}</title></rect>"
        )
    for tick in (t for t in choose_ticks(low, high, 8) if not whole or t == int(t)):
        svg.append(
            f'<text x="{across(tick):.1f}" y="{floor + 14}" text-anchor="middle">{format_short(tick)}</text>'
        )
    svg.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">{escape(unit)}</text>'
    )
    svg.append(
        f'<text transform="rotate(-90)" x="{-floor / 2}" y="12" text-anchor="middle">samples</text></svg>'
    )
    return f"{''.join(svg)}<p>{text}</p>"


def format_size(count: float) -> str:
    """Bytes as people say them: 20.5 KB, 1.2 GB (powers of 1000)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} bytes"


def _lead(dataset: Dataset) -> str:
    manifest = dataset.manifest
    samples, size = (
        sum(getattr(s, field) for s in manifest.shards) for field in ("samples", "bytes")
    )
    what = f"{samples:,} sample{'s' if samples != 1 else ''} of {' + '.join(dataset.modalities) or 'text alone'}, {size_of(size)}"
    texts = " and ".join(f".{t}" for t in manifest.text)
    rows = [
        (
            "built by",
            f"onellm shards build {manifest.source}"
            if manifest.source != "index"
            else "another tool; indexed by onellm",
        ),
        ("licence", manifest.licence),
        ("text", f"every sample has {texts}" if texts else "some samples have .txt, some .json"),
        ("shards", f"{len(manifest.shards):,}"),
        *(
            (k, json.dumps(v))
            for k, v in manifest.attributes.items()
            if not isinstance(v, (dict, list))
        ),
    ]
    return f'<p class="lead">{escape(what)}</p>{build_html_table(("", ""), rows)}'


def _drawn_how(modalities: Sequence[str]) -> list[str]:
    """How to look at the pictures: what each modality says of its preview."""
    said = [
        (name, (inspect.getdoc(get_modality(name).preview) or "").partition("\n\n")[0])
        for name in modalities
    ]
    return [f'<p class="dim">{escape(name)}: {escape(how)}</p>' for name, how in said if how]


def _splits(dataset: Dataset) -> str:
    rows = [
        (
            s,
            dataset.samples(s),
            len(dataset.shards(s)),
            format_size(sum(i.bytes for i in dataset.shards(s))),
        )
        for s in dataset.splits
    ]
    return build_html_table(("split", "samples", "shards", "size"), rows, right=(1, 2, 3))


def _parts(dataset: Dataset, counts: Mapping[str, int], statistics: Mapping[str, Any]) -> str:
    """What each part is, how many samples have it, and its mean size where the builder noted it."""
    roles = dict(_TEXT_PARTS)
    for name in dataset.modalities:
        for slot, accepted in get_modality_parts(get_modality(name)).items():
            roles.update(
                {e: f"{name}: {slot}" if slot != name else name for e in accepted if e in counts}
            )
    noted = statistics.get("parts_before_duplicates_went", {})

    def mean(part: str) -> str:
        found = noted.get(part, {})
        return format_size(found["bytes"] / found["count"]) if found.get("count") else ""

    rows = [
        (f".{p}", roles.get(p, "stored, not read in training"), n, mean(p))
        for p, n in sorted(counts.items())
    ]
    columns = 4 if any(row[3] for row in rows) else 3
    return build_html_table(
        ("part", "what it is", "samples that have it", "mean size")[:columns],
        [r[:columns] for r in rows],
        right=(2, 3),
    )


def _left_out(root: Path, statistics: Mapping[str, Any]) -> str:
    """Bad samples by kind with an example each, and what the source and the filters left out knowingly."""
    kinds, examples = Counter[str](), dict[str, str]()
    path = root / QUARANTINE
    if path.is_file():
        with path.open(encoding="ascii") as file:
            for line in file:
                bad = json.loads(line)
                kind = bad["reason"].split(":")[0]
                kinds[kind] += 1
                examples.setdefault(kind, f"{bad['file']}: {bad['reason']}")
    total = statistics.get("raw_samples")
    of = f" of {total:,} that the source listed" if total else ""
    bad_rows = [(kind, count, examples[kind]) for kind, count in kinds.most_common()]
    html = [
        f"<p>{sum(kinds.values()):,} bad{of}"
        + (f"; each is named in {QUARANTINE}.</p>" if kinds else ".</p>")
    ]
    html += (
        [build_html_table(("why", "samples", "the first one"), bad_rows, right=(1,))]
        if kinds
        else []
    )
    known = statistics.get("left_out", {})
    if known:
        html.append(
            "<p>Left out as asked (filters, duplicates, failed downloads, other splits):</p>"
        )
        html.append(build_html_table(("why", "samples"), Counter(known).most_common(), right=(1,)))
    return "".join(html)


def _statistics(root: Path) -> Mapping[str, Any]:
    """The builder's statistics.json; empty where there is none (indexed tars, the toy world)."""
    try:
        found = json.loads((root / STATISTICS).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
    look, statistics = DatasetOverview(dataset, seed), _statistics(root)
    part = (
        f" ({len(look.seen)} of {look.all} shards, evenly spread)"
        if len(look.seen) < look.all
        else ""
    )
    html = [f"<h1>{escape(dataset.name)}</h1>", _lead(dataset)]
    if previews:
        shown = look.rows(previews)
        html += [f"<h2>{len(shown)} samples drawn at random</h2>", *_drawn_how(dataset.modalities)]
        html.append(f'<div class="gallery">{"".join(figure(dataset, *s) for s in shown)}</div>')
    html += ["<h2>Splits</h2>", _splits(dataset)]
    html += [f"<h2>What a sample holds{part}</h2>", _parts(dataset, look.counts, statistics)]
    html += [f"<h2>Length of the texts{part}</h2>", draw_histogram(look.lengths, "bytes")]
    if any(e.rsplit(".", 1)[-1] in TIMED for e in look.counts):
        durations = look.durations(_PROBED)
        html += [
            f"<h2>Duration of {len(durations)} samples drawn at random</h2>",
            draw_histogram(durations, "s"),
        ]
    html += ["<h2>What was left out</h2>", _left_out(root, statistics)]
    if not previews:
        rows = [
            (f"{s.name}/{dataset.index(s).key(r)}", render_text(dataset, s, r))
            for s, r in look.rows(_EXAMPLES)
        ]
        html += [
            f"<h2>{len(rows)} texts drawn at random</h2>",
            build_html_table(("sample", "text"), rows, html=(1,)),
        ]
    return build_html_page(dataset.name, html, style=_STYLE)


def preview_command(root: Path, out: Path, *, previews: int, seed: int) -> int:
    """`onellm shards stats` (`previews` 0) and `onellm shards preview`. Returns the exit code.

    Raises:
        UsageError: there is no dataset, or the page cannot be written.
    """
    html = page(root, previews=previews, seed=seed)
    try:
        write_page(out, html)
    except OSError as error:
        raise UsageError(
            f"{out}: {error.strerror}.", "the page cannot be written.", "choose another --out."
        ) from error
    print(f"{out}: {len(html):,} bytes; open it in a browser")
    return EXIT_DONE
