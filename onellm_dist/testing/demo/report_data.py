"""Collects what the report shows: loss curves, router weights, pictures of test samples, facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common import run_files
from onellm_dist.common.counts import format_count
from onellm_dist.data.text_parts import read_meta
from onellm_dist.evaluation.report import Caption, ModalityResult
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.testing.demo.report import Curve, DemoReport, ShownSample, write_report
from onellm_dist.testing.jsonl import read_json_lines

PICTURES = 3
"""Test samples of each modality that the report shows."""

Lines = Sequence[Mapping[str, Any]]
"""Lines of a JSONL file of a run directory."""


def collect_report(
    path: Path,
    *,
    results: Sequence[ModalityResult],
    captions: Sequence[Caption],
    toy: Path,
    runs: Mapping[str, Path],
    pretrained: Path,
    timetable: Sequence[tuple[str, float, float]],
    device: str,
) -> None:
    """Write the report of a finished demo.

    Args:
        path: the HTML file.
        results: the table of results.
        captions: captions of the test samples.
        toy: folder of the datasets, one folder per modality.
        runs: name and directory of each run, in order; the last one's model wrote the captions.
        pretrained: folder of `clip.json` and `llm.json`.
        timetable: name, predicted and taken seconds of each stage.
        device: what the demo ran on.
    """
    towers = {
        name: json.loads((pretrained / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("clip", "llm")
    }
    metrics = {name: read_json_lines(run / run_files.METRICS) for name, run in runs.items()}
    curves = [
        Curve("toy CLIP", list(enumerate(towers["clip"]["loss"]))),
        Curve("toy LLM", list(enumerate(towers["llm"]["loss"]))),
    ]
    for name, run in runs.items():
        curves.append(make_curve(_make_title(name), metrics[name], read_events(run)))
    report = DemoReport(
        title="OneLLM on the toy world",
        facts=_collect_facts(device, towers, metrics, runs),
        results=results,
        curves=curves,
        routers={
            _make_title(name): compute_router_weights(run / run_files.MODEL)
            for name, run in runs.items()
            if name.startswith("align")
        },
        samples=draw_samples(toy, captions),
        timetable=timetable,
        notes=["A caption is right (green) if every word is."],
    )
    write_report(path, report)


def _collect_facts(
    device: str,
    towers: Mapping[str, Any],
    metrics: Mapping[str, Lines],
    runs: Mapping[str, Path],
) -> dict[str, str]:
    clip, llm = towers["clip"], towers["llm"]
    return {
        "device": device,
        "toy CLIP": (
            f"{format_count(clip['images'], 'image')}; top-1 {clip['top1_hard_batches']:.2f} on "
            "hard batches"
        ),
        "toy LLM": (
            f"{llm['documents']:,} documents; writes {llm['held_out_from_words']:.2f} of the "
            "held-out captions"
        ),
        **{_make_title(name): _format_training(lines) for name, lines in metrics.items()},
        "resumed": _format_resumes(runs),
    }


def _make_title(run: str) -> str:
    return run.replace("_", " ")


def read_events(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's `events.jsonl`."""
    return read_json_lines(run / run_files.EVENTS)


def make_curve(name: str, metrics: Lines, events: Lines) -> Curve:
    """Make the loss curve of a run, in total and by modality, with its resumes marked.

    Args:
        name: title of the curve.
        metrics: lines of `metrics.jsonl`.
        events: lines of `events.jsonl`.
    """
    by_modality: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for modality, loss in line["loss_by_modality"].items():
            by_modality.setdefault(modality, []).append((float(line["step"]), float(loss)))
    return Curve(
        name,
        [(float(line["step"]), float(line["loss"])) for line in metrics],
        dict(sorted(by_modality.items())) if len(by_modality) > 1 else {},
        {float(step): "killed, resumed" for step in _list_resumes(events)},
    )


def _list_resumes(events: Lines) -> list[int]:
    return [e["first_step"] for e in events if e["event"] == "start" and e["first_step"] > 0]


def list_resumes(run: Path) -> list[int]:
    """List the first steps of the starts that resumed from a checkpoint."""
    return _list_resumes(read_events(run))


@torch.inference_mode()
def compute_router_weights(model_path: Path) -> dict[str, list[list[float]]]:
    """Compute the router weights of a saved model; they do not depend on its input.

    Returns:
        Modality to [Q][E].
    """
    from transformers.utils import logging

    from onellm_dist.model.presets import load_model

    logging.disable_progress_bar()  # the demo shows its own
    loaded, _ = load_model(path=model_path, preset=None, seed=0)
    model: Any = loaded
    return {
        name: projector.router(projector.queries()).tolist()
        for name, projector in model.projectors.items()
    }


def draw_samples(
    toy: Path, captions: Sequence[Caption], count: int = PICTURES
) -> list[ShownSample]:
    """Draw the first held-out samples of each modality, with what the model wrote.

    Args:
        toy: folder of the datasets, one folder per modality.
        captions: captions of the test samples.
        count: samples of each modality.
    """
    shown: list[ShownSample] = []
    for name in dict.fromkeys(caption.modality for caption in captions):
        held_out = [c for c in captions if c.modality == name and "held" in c.split]
        shown += _draw_modality(toy / name, name, held_out[:count])
    return shown


def _draw_modality(folder: Path, name: str, captions: Sequence[Caption]) -> list[ShownSample]:
    modality, dataset = get_modality(name), open_dataset(folder)
    wanted = {caption.key: caption for caption in captions}
    shown: list[ShownSample] = []
    for split in dict.fromkeys(caption.split for caption in captions):
        for shard in dataset.shards(split):
            index = dataset.index(shard)
            for row in range(shard.samples):
                caption = wanted.pop(index.key(row), None)
                if caption is None:
                    continue
                parts = read_parts(dataset, shard, row)
                matched = {part: parts[e] for part, e in modality.match(parts).items()}
                picture = modality.preview(modality.read_raw(matched, read_meta(parts)))
                reference, prediction = caption.reference, caption.prediction
                shown.append(ShownSample(name, picture, reference, prediction, split))
    return shown


def _format_training(metrics: Lines) -> str:
    if not metrics:
        return "no step"
    samples = sum(line["samples"] for line in metrics)
    loss = metrics[-1]["loss"]
    counts = f"{format_count(len(metrics), 'step')}, {format_count(samples, 'sample')}"
    return f"{counts}, last loss {loss:.3f}"


def _format_resumes(runs: Mapping[str, Path]) -> str:
    found = list[str]()
    for name, run in runs.items():
        before = ""
        for event in read_events(run):
            if event["event"] == "start" and event["first_step"] > 0:
                why = before or "after SIGKILL"
                found.append(f"{_make_title(name)} from step {event['first_step']}, {why}")
            if event["event"] in ("start", "end"):
                before = f"{event['status']} before" if event["event"] == "end" else ""
    return ", ".join(found) or "nothing"
