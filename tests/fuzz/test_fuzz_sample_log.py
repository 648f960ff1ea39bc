"""Mutated files of a run's sample log: an answer, or a refusal in words; and a start continues."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import fuzz, replay
from mutators import (
    mutate_any,
    mutate_bytes,
    mutate_json,
    mutate_json_lines,
    mutate_lines,
)

from onellm_dist.config.yaml_text import dump_yaml
from onellm_dist.data.phases import DataPhase, compute_shards_fingerprint
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.train.records.data_phases import write_data_phases
from onellm_dist.train.records.json_lines import append_lines
from onellm_dist.train.records.run_directory import drop_repeated_lines
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.sample_log.command import samples_command

STEPS, BATCH = 12, 4
KEY = "b003 \u2028x"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two data phases, with every file that the sample log has."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of cases, and no power is cut
    found = tmp_path / "run"
    datasets = {}
    for name in ("a", "b"):
        with DatasetWriter(tmp_path / name, name=name, modalities=(), max_samples=4) as writer:
            for number in range(9):
                key = KEY if (name, number) == ("b", 3) else f"{name}{number:03d}"
                writer.add("train", key, {"txt": b"a red cube"})
        datasets[name] = open_dataset(tmp_path / name)
    shards = {
        name: compute_shards_fingerprint(dataset.shards("train"))
        for name, dataset in datasets.items()
    }
    phases = [
        DataPhase(0, 3, "train", BATCH, "text", {"a": 1}, {"a": shards["a"]}),
        DataPhase(5, 3, "train", BATCH, "text", {"a": 2, "b": 1}, shards),
    ]
    locations = {name: str(tmp_path / name) for name in datasets}
    write_data_phases(found / "samples", phases, locations)
    mixture = [{"path": "a", "weight": 2.0}, {"path": "b", "weight": 1.0}]
    config = {"data": {"root": str(tmp_path), "mixture": mixture}, "train": {"steps": STEPS}}
    (found / "config.yaml").write_text(dump_yaml(config))
    log = SampleLog(found / "samples", rank=0)
    log.begin(0)
    log.record_step(2, {"a/train-000000/a001@0": "gone", "a/train-000001/a004@0": "excluded by x"})
    log.exclude(4, "a loss spike", ["a/train-000001/a005@0"])
    log.record_step(6, {f"b/train-000000/{KEY}@0": "gone"})
    log.begin(5)
    log.close()
    metrics = [{"step": n, "loss": 1.5, "applied": n != 3, "seconds": 0.5} for n in range(7)]
    append_lines(found / "metrics.jsonl", metrics)
    return found


def look_up(run_dir: Path) -> None:
    """Ask for what `onellm samples` knows: the run, steps of both phases, and a sample."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        samples_command(run_dir, None, None, as_json=True)
        samples_command(run_dir, 3, None, as_json=True)
        samples_command(run_dir, STEPS - 1, None, as_json=False)
        samples_command(run_dir, None, "a/train-000000/a001@0", as_json=True)


def resume(run_dir: Path) -> None:
    """Do what a start does with the records of the starts before it."""
    log = SampleLog(run_dir / "samples", rank=0)
    log.begin(4)
    log.close()
    drop_repeated_lines(run_dir, 4)


def make_surface(run_dir: Path, name: str) -> Callable[[bytes], None]:
    """Mutate one file of the run; the others are intact again before each case."""
    whole = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    def read(data: bytes) -> None:
        for path in [path for path in run_dir.rglob("*") if path.is_file()]:
            path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)
        path = run_dir / name
        path.write_bytes(data)
        if name.endswith(TOLERANT):
            resume(run_dir)
            path.write_bytes(data)
        look_up(run_dir)

    return read


LINES = mutate_any(mutate_json_lines, mutate_json_lines, mutate_bytes)
JSON = mutate_any(mutate_json, mutate_json, mutate_bytes)
TEXT = mutate_any(mutate_lines, mutate_bytes)
FILES = {
    "config.yaml": TEXT,
    "samples/data_phases.json": JSON,
    "samples/datasets.json": JSON,
    "samples/skipped-rank00000.jsonl": LINES,
    "samples/listed-rank00000.jsonl": LINES,
    "samples/excluded.jsonl": LINES,
    "samples/starts.jsonl": LINES,
    "samples/progress": mutate_bytes,
    "metrics.jsonl": LINES,
}
TOLERANT = ("jsonl", "progress")
"""A damaged line of these is passed over, as one that a kill cut short."""


def run_file(run_dir: Path, name: str, cases: int) -> None:
    seeds = [(run_dir / name).read_bytes()]
    surface = make_surface(run_dir, name)
    report = fuzz(f"sample log {name}", surface, seeds, FILES[name], cases=cases)
    report.require_clean(0 if name.endswith(TOLERANT) else 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.seconds
def test_mutated_sample_logs(run_dir: Path, name: str) -> None:
    run_file(run_dir, name, 40)


@pytest.mark.soak
@pytest.mark.parametrize("name", FILES)
def test_mutated_sample_logs_for_hours(run_dir: Path, name: str) -> None:
    run_file(run_dir, name, 5000)


def test_inputs_that_once_failed_are_answered_or_refused(run_dir: Path) -> None:
    replay("data_phases", make_surface(run_dir, "samples/data_phases.json"))


def test_a_key_with_an_end_of_line_of_unicode_stays_left_out(run_dir: Path) -> None:
    log = SampleLog(run_dir / "samples", rank=0)
    assert f"b/train-000000/{KEY}@0" in log.left_out
    log.close()
