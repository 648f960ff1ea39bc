"""`onellm shards overlap`: what training shards contain of benchmarks.

Benchmarks are datasets that a source `NAME-eval` built; all others are training data. The output
folder has `media.txt` and `texts.txt`, lists of questions for `onellm score --without`, and
`overlap.json` with every pair that was found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.progress import progress
from onellm_dist.modalities import Part
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.tools.fingerprints import MediaFingerprint, compute_fingerprint
from onellm_dist.shards.tools.overlap_search import MediaIndex, TextIndex
from onellm_dist.shards.tools.safe_decoding import map_rows


@dataclass(frozen=True)
class ScannedSample:
    """A sample as it is compared."""

    name: str
    """`dataset/shard/key`."""
    fingerprint: MediaFingerprint | None
    """None: its media cannot be read."""
    texts: Sequence[str]
    questions: Sequence[Mapping[str, Any]] = ()
    """Questions of a benchmark's sample."""


@dataclass
class OverlapReport:
    """What was found.

    Attributes:
        media: `TASK/ID` -> (training sample, how it was recognised).
        texts: `TASK/ID` -> training sample.
        unreadable: samples whose media could not be read, and were not compared.
        compared: training samples.
        questions: questions of the benchmarks.
    """

    media: dict[str, tuple[str, str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    compared: int = 0
    questions: int = 0


def find_overlap(datasets: Sequence[Path | str]) -> OverlapReport:
    """Find which questions of benchmarks have media or texts that training data contain.

    Args:
        datasets: training data and benchmarks, in any order.

    Raises:
        UsageError: there is no benchmark, or no training data.
    """
    opened = [open_dataset(place) for place in datasets]
    benchmarks = [d for d in opened if "benchmark" in d.manifest.attributes]
    training = [d for d in opened if "benchmark" not in d.manifest.attributes]
    if not benchmarks or not training:
        missing = "benchmark (built by a source NAME-eval)" if training else "training dataset"
        raise UsageError(
            f"there is no {missing} among {', '.join(map(str, datasets))}",
            "training data are compared with benchmarks.",
            "name at least one of each.",
        )
    report = OverlapReport()
    media: list[ScannedSample] = []
    owners: list[list[str]] = []
    texts: dict[str, Sequence[str]] = {}
    for dataset in benchmarks:
        task = str(dataset.manifest.attributes["benchmark"])
        for sample in _scan(dataset, report):
            media.append(sample)
            owners.append([f"{task}/{q['id']}" for q in sample.questions])
            for record in sample.questions:
                asked, references = str(record.get("text", "")), record.get("answers", ())
                texts[f"{task}/{record['id']}"] = [asked, *map(str, references)]
    report.questions = len(texts)
    media_index = MediaIndex([sample.fingerprint for sample in media])
    text_index = TextIndex(texts)
    for dataset in training:
        for sample in _scan(dataset, report):
            report.compared += 1
            matches = media_index.find(sample.fingerprint) if sample.fingerprint else ()
            for match in matches:
                for question in owners[match.place]:
                    report.media.setdefault(question, (sample.name, match.how))
            for question in text_index.find(sample.texts):
                report.texts.setdefault(question, sample.name)
    return report


def write_overlap(out: Path, report: OverlapReport) -> None:
    """Write the lists and the pairs."""
    out.mkdir(parents=True, exist_ok=True)
    media = sorted(report.media.items())
    lines = [f"{name}\t{how} in {sample}\n" for name, (sample, how) in media]
    write_atomic(out / "media.txt", "".join(lines))
    texts = sorted(report.texts.items())
    lines = [f"{name}\tthe same words in {sample}\n" for name, sample in texts]
    write_atomic(out / "texts.txt", "".join(lines))
    content = {
        "compared": report.compared,
        "questions": report.questions,
        "media": {name: {"sample": s, "how": how} for name, (s, how) in report.media.items()},
        "texts": report.texts,
        "unreadable": report.unreadable,
    }
    write_atomic(out / "overlap.json", json.dumps(content, indent=1, sort_keys=True) + "\n")


def format_overlap(out: Path, report: OverlapReport) -> str:
    """What was found, in lines for a terminal."""
    lines = [
        f"{format_count(report.compared, 'training sample')} compared with "
        f"{format_count(report.questions, 'question')}",
        f"{format_count(len(report.media), 'question has', 'questions have')} a medium of the "
        "training "
        f"data: {out / 'media.txt'}",
        f"{format_count(len(report.texts), 'has', 'have')} words of it: {out / 'texts.txt'}",
    ]
    if report.unreadable:
        lines.append(
            f"{format_count(len(report.unreadable), 'sample')} could not be read: overlap.json"
        )
    return "\n".join(lines)


def _scan(dataset: Dataset, report: OverlapReport) -> Iterator[ScannedSample]:
    rows = [
        (shard, row)
        for split in dataset.splits
        for shard in dataset.shards(split)
        for row in range(shard.samples)
    ]
    with (
        progress(len(rows), f"Comparing {dataset.name}", unit="samples") as bar,
        closing(map_rows(dataset, rows, _scan_row, _refuse)) as found,
    ):
        for sample in found:
            if sample.fingerprint is None:
                report.unreadable.append(sample.name)
            bar.advance()
            yield sample


def _scan_row(dataset: Dataset, shard: ShardInfo, row: int) -> ScannedSample:
    parts = read_parts(dataset, shard, row)
    meta = _load_meta(parts)
    name = f"{dataset.name}/{shard.name}/{dataset.index(shard).key(row)}"
    try:
        fingerprint = compute_fingerprint(dataset.modalities, parts, meta)
    except SampleError:
        fingerprint = None
    questions = meta.get("questions", ()) if "benchmark" in dataset.manifest.attributes else ()
    texts = [part.data.decode("utf-8", "replace") for e, part in parts.items() if e == "txt"]
    return ScannedSample(name, fingerprint, [*texts, *_list_texts(meta)], questions)


def _refuse(dataset: Dataset, shard: ShardInfo, row: int, reason: str) -> ScannedSample:
    name = f"{dataset.name}/{shard.name}/{dataset.index(shard).key(row)}"
    return ScannedSample(name, None, ())


def _load_meta(parts: Mapping[str, Part]) -> dict[str, Any]:
    try:
        value = json.loads(parts["json"].data) if "json" in parts else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _list_texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _list_texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _list_texts(part)
