"""Gathers what the report shows: loss curves, router weights, pictures of test samples, figures of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onellm_dist.data.text_parts import read_meta
from onellm_dist.evaluation.report import Caption, ModalityResult
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.format.index import read_parts
from onellm_dist.testing.demo.report import Curve, Report, Sample, write_report

PICTURES = 3
"""Test samples of each modality that the report shows."""


def collect_report(
    path: Path,
    *,
    results: Sequence[ModalityResult],
    captions: Sequence[Caption],
    toy: Path,
    runs: Mapping[str, Path],
    standins: Path,
    timetable: Sequence[tuple[str, float, float]],
    device: str,
) -> None:
    """Write the report of a finished demo.

    Args:
        toy: the datasets, a folder a modality.
        runs: name to run directory, in their order; the last one's model made the captions.
        standins: where `clip.json` and `llm.json` lie.
    """
    towers = {
        name: json.loads((standins / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("clip", "llm")
    }
    metrics = {name: read_metrics(run) for name, run in runs.items()}
    curves = [
        Curve("stand-in CLIP", list(enumerate(towers["clip"]["loss"]))),
        Curve("stand-in LLM", list(enumerate(towers["llm"]["loss"]))),
        *(
            run_curve(name.replace("_", " "), metrics[name], read_events(run))
            for name, run in runs.items()
        ),
    ]
    routers = {
        name.replace("_", " "): router_weights(run / "model")
        for name, run in runs.items()
        if name.startswith("align")
    }
    facts = {
        "device": device,
        "stand-in CLIP": f"{towers['clip']['images']:,} images; top-1 {towers['clip']['top1_hard_batches']:.2f} on hard batches",
        "stand-in LLM": f"{towers['llm']['documents']:,} documents; writes {towers['llm']['held_out_from_words']:.2f} of held-out captions",
        **{name.replace("_", " "): _samples_of(metrics[name]) for name in runs},
        "resumed": _resumed(runs),
    }
    report = Report(
        "OneLLM on the toy world",
        facts,
        results,
        curves,
        routers,
        sample_pictures(toy, captions),
        timetable,
        notes=["A caption is right (green) when every word is."],
    )
    write_report(path, report)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of `events.jsonl`."""
    return [
        json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def run_curve(
    name: str, metrics: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]
) -> Curve:
    """The loss of a run, in total and by modality, with the steps at which it was resumed."""
    total = [(float(m["step"]), float(m["loss"])) for m in metrics]
    kinds = sorted({kind for m in metrics for kind in m["loss_by_modality"]})
    by_modality = {
        k: [
            (float(m["step"]), float(m["loss_by_modality"][k]))
            for m in metrics
            if k in m["loss_by_modality"]
        ]
        for k in kinds
    }
    marks = {
        float(e["first_step"]): "killed, resumed"
        for e in events
        if e["event"] == "start" and e["first_step"] > 0
    }
    return Curve(name, total, by_modality if len(kinds) > 1 else {}, marks)


@torch.inference_mode()
def router_weights(model_path: Path) -> dict[str, list[list[float]]]:
    """Modality -> [Q][E]: the gates of a saved model (they do not depend on the input)."""
    from onellm_dist.model.presets import load_model

    loaded, _ = load_model(path=model_path, preset=None, seed=0)
    model: Any = loaded
    return {
        name: projector.router(projector.queries()).tolist()
        for name, projector in model.projectors.items()
    }


def sample_pictures(toy: Path, captions: Sequence[Caption], count: int = PICTURES) -> list[Sample]:
    """The first held-out samples of each modality, as a person looks at them, with what the model said."""
    shown: list[Sample] = []
    for name in dict.fromkeys(c.modality for c in captions):
        modality, dataset = get_modality(name), open_dataset(toy / name)
        chosen = [c for c in captions if c.modality == name and "held" in c.split][:count]
        wanted = {c.key: c for c in chosen}
        for split in dict.fromkeys(c.split for c in chosen):
            for shard in dataset.shards(split):
                index = dataset.index(shard)
                for row in range(shard.samples):
                    caption = wanted.pop(index.key(row), None)
                    if caption is None:
                        continue
                    parts = read_parts(dataset, shard, row)
                    raw = modality.decode(
                        {slot: parts[e] for slot, e in modality.match(parts).items()},
                        read_meta(parts),
                    )
                    shown.append(
                        Sample(
                            name,
                            modality.preview(raw),
                            caption.reference,
                            caption.prediction,
                            split,
                        )
                    )
    return shown


def _samples_of(metrics: Sequence[dict[str, Any]]) -> str:
    samples = sum(m["samples"] for m in metrics)
    return (
        f"{len(metrics):,} steps, {samples:,} samples, last loss {metrics[-1]['loss']:.3f}"
        if metrics
        else "no step"
    )


def resumed_at(run: Path) -> list[int]:
    """The steps at which later starts of a run went on from a checkpoint."""
    return [
        event["first_step"]
        for event in read_events(run)
        if event["event"] == "start" and event["first_step"] > 0
    ]


def _resumed(runs: Mapping[str, Path]) -> str:
    found = list[str]()
    for name, run in runs.items():
        before = ""
        for event in read_events(run):
            if event["event"] == "start" and event["first_step"] > 0:
                found.append(
                    f"{name.replace('_', ' ')} from step {event['first_step']}, {before or 'after SIGKILL'}"
                )
            if event["event"] in ("start", "end"):
                before = f"{event['status']} before" if event["event"] == "end" else ""
    return ", ".join(found) or "nothing"
