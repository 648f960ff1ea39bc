"""`onellm shards stats` and `preview`: one static HTML page about a dataset.

Everything is inline; the page fetches nothing.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.html.charts import choose_ticks, format_short
from onellm_dist.common.html.page import build_html_page, build_html_table, write_page
from onellm_dist.common.output import write_output
from onellm_dist.modalities import get_modality
from onellm_dist.shards.build.finish import STATISTICS
from onellm_dist.shards.build.staging import DAMAGED, QUARANTINE
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.media import split_prefix
from onellm_dist.shards.format.names import get_modality_parts
from onellm_dist.shards.storage.paths import to_storage_path
from onellm_dist.shards.tools.named_samples import NamedSample, describe_sample, find_samples
from onellm_dist.shards.tools.preview_samples import (
    TIMED,
    DatasetOverview,
    find_media_faults,
    render_samples,
    render_text,
)

_PROBED = 200
"""Samples whose duration is measured."""
_EXAMPLES = 20
_BINS = 40
_WIDEST = 48
"""Most pixels of a bar, where there are few."""
_STYLE = """
h1{margin-bottom:.2rem}.lead{font-size:1.05rem;margin-top:0}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1.4rem 1rem}
figure{margin:0}img{max-width:100%;display:block;background:var(--soft);margin-bottom:.3rem}
figcaption{font-size:.85rem;overflow-wrap:anywhere}
figcaption ul,td ul{margin:.1rem 0;padding-left:1.1rem}.key{color:var(--dim);font-size:.75rem}
rect{fill:#4477aa}
svg.histogram{max-width:720px;display:block}
"""
_TEXT_PARTS = {
    "txt": "the caption",
    "json": "captions or a conversation, and other metadata of the sample",
}


def draw_histogram(values: Sequence[float] | NDArray[np.generic], unit: str) -> str:
    """Draw an SVG histogram with scales on both axes.

    A line with the least, median, mean and greatest value follows. Whole numbers have a bar each if
    they are few.
    """
    data = np.asarray(values, float)
    if not data.size:
        return "<p>no values</p>"
    low, high = float(data.min()), float(data.max())
    few = bool((data == data.round()).all()) and high - low < _BINS
    edges = np.arange(low - 0.5, high + 1.5) if few else np.histogram_bin_edges(data, bins=_BINS)
    axes = _HistogramAxes(edges, np.histogram(data, bins=edges)[0])
    middle = f"median {np.median(data):.4g}, mean {data.mean():.4g}"
    text = escape(f"{data.size:,} values, least {low:.4g}, {middle}, greatest {high:.4g} {unit}")
    size = f'viewBox="0 0 {_HistogramAxes.WIDTH} {_HistogramAxes.HEIGHT}"'
    ticks_across = [t for t in choose_ticks(low, high, 8) if not few or t == int(t)]
    svg = [
        f'<svg class="histogram" {size} role="img" aria-label="{text}">',
        *axes.draw_grid(),
        *axes.draw_bars(unit),
        *axes.draw_labels(ticks_across, unit),
        "</svg>",
    ]
    return f"{''.join(svg)}<p>{text}</p>"


class _HistogramAxes:
    """The scales of a histogram, and what is drawn on them.

    Args:
        edges: edges of the bins.
        counts: values in each bin.
    """

    WIDTH = 720
    HEIGHT = 170
    LEFT = 56
    RIGHT = 14
    FLOOR = HEIGHT - 36
    """Vertical position of the horizontal axis."""

    def __init__(self, edges: NDArray[np.float64], counts: NDArray[np.intp]) -> None:
        self.edges = edges
        self.counts = counts
        self.top = max(1, int(counts.max()))

    def across(self, value: float) -> float:
        """Return the horizontal position of a value."""
        share = (value - self.edges[0]) / (self.edges[-1] - self.edges[0])
        return float(self.LEFT + share * (self.WIDTH - self.LEFT - self.RIGHT))

    def up(self, count: float) -> float:
        """Return the vertical position of a count."""
        return self.FLOOR - (self.FLOOR - 10) * count / self.top

    def draw_grid(self) -> Iterator[str]:
        """Yield the horizontal lines, with their counts."""
        for tick in (t for t in choose_ticks(0, self.top, 3) if t == int(t)):
            y = self.up(tick)
            yield (
                f'<line class="grid" x1="{self.LEFT}" x2="{self.WIDTH - self.RIGHT}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            label = format_short(tick)
            yield f'<text x="{self.LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'

    def draw_bars(self, unit: str) -> Iterator[str]:
        """Yield a bar for each bin, with its range as a tooltip."""
        for i, count in enumerate(self.counts.tolist()):
            start, end = self.across(float(self.edges[i])), self.across(float(self.edges[i + 1]))
            middle = (start + end) / 2
            start, end = max(start, middle - _WIDEST / 2), min(end, middle + _WIDEST / 2)
            label = f"{self.edges[i]:.4g} to {self.edges[i + 1]:.4g} {escape(unit)}: {count}"
            yield (
                f'<rect x="{start:.1f}" y="{self.up(count):.1f}" '
                f'width="{max(1.0, end - start - 1):.1f}" '
                f'height="{self.FLOOR - self.up(count):.1f}"><title>{label}</title></rect>'
            )

    def draw_labels(self, values: Sequence[float], unit: str) -> Iterator[str]:
        """Yield the labels of the horizontal axis, and the names of both axes."""
        for value in values:
            x = f"{self.across(value):.1f}"
            label = format_short(value)
            yield f'<text x="{x}" y="{self.FLOOR + 14}" text-anchor="middle">{label}</text>'
        middle = (self.LEFT + self.WIDTH - self.RIGHT) / 2
        place = f'x="{middle}" y="{self.HEIGHT - 4}"'
        yield f'<text {place} text-anchor="middle">{escape(unit)}</text>'
        place = f'x="{-self.FLOOR / 2}" y="12"'
        yield f'<text transform="rotate(-90)" {place} text-anchor="middle">samples</text>'


def format_size(count: float) -> str:
    """Format bytes as people write them: 20.5 KB, 1.2 GB (powers of 1000)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} bytes"


def _make_lead(dataset: Dataset) -> str:
    manifest = dataset.manifest
    samples = sum(s.samples for s in manifest.shards)
    size = format_size(sum(s.bytes for s in manifest.shards))
    joined = " and ".join(dataset.modalities) if dataset.lists_media else ""
    modalities = joined or " + ".join(dataset.modalities) or "text alone"
    modalities += " (each sample lists its media)" if dataset.lists_media else ""
    what = f"{format_count(samples, 'sample')} of {modalities}, {size}"
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


def _explain_previews(modalities: Sequence[str]) -> list[str]:
    """Explain the pictures with what each modality says of its preview."""
    texts = [
        (name, (inspect.getdoc(get_modality(name).preview) or "").partition("\n\n")[0])
        for name in modalities
    ]
    return [f'<p class="dim">{escape(name)}: {escape(how)}</p>' for name, how in texts if how]


def _make_splits(dataset: Dataset) -> str:
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


def _make_parts(dataset: Dataset, counts: Mapping[str, int], statistics: Mapping[str, Any]) -> str:
    """Make the table of parts: what each is, how many samples have it, its mean size if known."""
    roles = dict(_TEXT_PARTS)
    for name in dataset.modalities:
        for part, accepted in get_modality_parts(get_modality(name)).items():
            role = f"{name}: {part}" if part != name else name
            roles.update({e: role for e in accepted if e in counts})
            for numbered in counts:
                prefix, own = split_prefix(numbered)
                if prefix and own in accepted:
                    roles[numbered] = f"{role} {prefix}"
    noted = statistics.get("parts_before_deduplication", {})

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


def _make_left_out(root: Path, statistics: Mapping[str, Any]) -> str:
    """List bad samples by reason with an example each, and what was left out knowingly."""
    reasons, examples = Counter[str](), dict[str, str]()
    path = root / QUARANTINE
    if path.is_file():
        with path.open(encoding="ascii") as file:
            for line in file:
                bad = json.loads(line)
                reason = bad["reason"].split(":")[0]
                reasons[reason] += 1
                examples.setdefault(reason, f"{bad['file']}: {bad['reason']}")
    total = statistics.get("raw_samples")
    of = f" of {total:,} that the source listed" if total else ""
    bad_rows = [(reason, count, examples[reason]) for reason, count in reasons.most_common()]
    html = [
        f"<p>{sum(reasons.values()):,} bad{of}"
        + (f"; each is named in {QUARANTINE}.</p>" if reasons else ".</p>")
    ]
    html += (
        [build_html_table(("why", "samples", "the first one"), bad_rows, right=(1,))]
        if reasons
        else []
    )
    damaged = statistics.get("damaged", 0)
    if damaged:
        html.append(
            f"<p>{damaged:,} are used although some of their media is missing; "
            f"{DAMAGED} says what.</p>"
        )
    known = statistics.get("left_out", {})
    if known:
        html.append(
            "<p>Left out as asked (filters, duplicates, failed downloads, other splits):</p>"
        )
        html.append(build_html_table(("why", "samples"), Counter(known).most_common(), right=(1,)))
    return "".join(html)


def _read_statistics(root: Path) -> Mapping[str, Any]:
    """Read the builder's statistics.json; indexed tars and the toy world have none."""
    try:
        found = json.loads((root / STATISTICS).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def build_page(
    root: Path | str, *, previews: int, seed: int = 0, follow_links: bool = False
) -> str:
    """Build the HTML of the page.

    Args:
        root: a dataset's folder or URL.
        previews: number of samples that are drawn; with 0, texts are listed instead.
        seed: which samples are shown.
        follow_links: whether its files may be links that lead out of the folder.

    Raises:
        UsageError: there is no dataset.
    """
    dataset = open_dataset(root, follow_links=follow_links)
    root = dataset.root
    overview, statistics = DatasetOverview(dataset, seed), _read_statistics(root)
    part = (
        f" ({len(overview.shards)} of {overview.shard_count} shards, evenly spread)"
        if len(overview.shards) < overview.shard_count
        else ""
    )
    html = [f"<h1>{escape(dataset.name)}</h1>", _make_lead(dataset)]
    if previews:
        shown = overview.draw_rows(previews)
        html.append(f"<h2>{format_count(len(shown), 'sample')} drawn at random</h2>")
        html += _explain_previews(dataset.modalities)
        html.append(f'<div class="gallery">{render_samples(dataset, shown)}</div>')
    html += ["<h2>Splits</h2>", _make_splits(dataset)]
    html.append(f"<h2>What a sample holds{part}</h2>")
    html.append(_make_parts(dataset, overview.counts, statistics))
    html += [f"<h2>Length of the texts{part}</h2>", draw_histogram(overview.text_bytes, "bytes")]
    if any(e.rsplit(".", 1)[-1] in TIMED for e in overview.counts):
        durations = overview.measure_durations(_PROBED)
        html.append(
            f"<h2>Duration of {format_count(len(durations), 'sample')} drawn at random</h2>"
        )
        html.append(draw_histogram(durations, "s"))
    html += ["<h2>What was left out</h2>", _make_left_out(root, statistics)]
    if not previews:
        rows = [
            (f"{s.name}/{dataset.index(s).key(r)}", render_text(dataset, s, r))
            for s, r in overview.draw_rows(_EXAMPLES)
        ]
        html.append(f"<h2>{format_count(len(rows), 'text')} drawn at random</h2>")
        html.append(build_html_table(("sample", "text"), rows, html=(1,)))
    return build_html_page(dataset.name, html, style=_STYLE)


def preview_command(
    root: Path | str,
    out: Path,
    *,
    previews: int,
    seed: int = 0,
    keys: Sequence[str] = (),
    follow_links: bool = False,
) -> int:
    """Run `onellm shards stats` (`previews` is 0) or `onellm shards preview`.

    Args:
        root: a dataset's folder or URL.
        out: the page.
        previews: number of samples that are drawn.
        seed: which samples are drawn.
        keys: show these samples instead, and describe them on the terminal.
        follow_links: whether its files may be links that lead out of the folder.

    Returns:
        The exit code.

    Raises:
        UsageError: there is no dataset, it has no such key, or the page cannot be written.
    """
    location = str(to_storage_path(root))
    if keys:
        dataset = open_dataset(location, follow_links=follow_links)
        samples = find_samples(dataset, keys)
        faults = find_media_faults(dataset, [(s.shard, s.row) for s in samples])
        for sample, found in zip(samples, faults, strict=True):
            write_output(
                "\n".join([describe_sample(dataset, sample), *(f"  {fault}" for fault in found)])
            )
        html = build_samples_page(dataset, samples)
    else:
        html = build_page(location, previews=previews, seed=seed, follow_links=follow_links)
    try:
        write_page(out, html)
    except OSError as error:
        raise UsageError(
            f"{out}: {error.strerror}.", "the page cannot be written.", "choose another --out."
        ) from error
    write_output(f"{out}: {len(html):,} bytes; open it in a browser")
    return EXIT_DONE


def build_samples_page(dataset: Dataset, samples: Sequence[NamedSample]) -> str:
    """Build the HTML of a page about named samples.

    Args:
        dataset: an open dataset.
        samples: some of its samples.
    """
    figures = render_samples(dataset, [(s.shard, s.row) for s in samples])
    texts = "".join(f"<pre>{escape(describe_sample(dataset, s))}</pre>" for s in samples)
    html = [
        f"<h1>{escape(dataset.name)}</h1>",
        *_explain_previews(dataset.modalities),
        f'<div class="gallery">{figures}</div>',
        f"<h2>Where they lie</h2>{texts}",
    ]
    return build_html_page(dataset.name, html, style=_STYLE)
