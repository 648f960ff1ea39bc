"""The benchmarks of an integration run, through the commands that a user would run."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from onellm_dist.common import run_files
from onellm_dist.testing.integration.benchmarks import write_benchmarks, write_seen
from onellm_dist.testing.integration.fetch import PackageCache
from onellm_dist.testing.integration.integration_run import IntegrationRun
from onellm_dist.testing.integration.media_samples import list_views

COMPARED = ("mme", "clotho-aqa")
"""What the aligned model answers too."""
SHOW_PICTURES = {"flickr30k": 1, "mme": 2}
"""Benchmark of the pictures -> its questions about each."""
_ONELLM = (sys.executable, "-m", "onellm_dist.cli")


def evaluate_models(run: IntegrationRun) -> None:
    """Build the benchmarks, answer and score them with the tuned model, compare with the aligned.

    Raises:
        OneLLMError: a command failed.
    """
    tasks = _build_benchmarks(run)
    began = time.monotonic()
    tuned = _answer(run, "tune", tasks)
    seconds = time.monotonic() - began
    aligned = _answer(run, "align", COMPARED)
    compared = run.run_command("score", [*_ONELLM, "score", "--compare", tuned, aligned])
    results = json.loads((tuned / "results.json").read_text(encoding="utf-8"))
    run.facts["evaluation"] = {
        "seconds": round(seconds, 1),
        "tasks": {name: _count(tuned / name) for name in tasks},
        "results": results["results"],
        "intervals": results["intervals"],
        "not_computed": results["not-computed"],
        "compared": compared.strip().splitlines(),
        "overlap": _find_seen(run, tuned),
    }
    answered = sum(row["answered"] for row in run.facts["evaluation"]["tasks"].values())
    run.log(f"{answered} questions of {len(tasks)} benchmarks answered: {tuned / 'report.html'}")


def _build_benchmarks(run: IntegrationRun) -> list[str]:
    """Write official layouts and build a dataset of each benchmark; returns their names."""
    cache = PackageCache(run.out / "packages", log=run.log)
    inputs = run.out / "benchmarks"
    views = dict(list_views(cache))
    built = []
    for folder, names in write_benchmarks(run.out / "media", views, inputs).items():
        for name in names:
            _build(run, f"{name}-eval", inputs / folder, "any_count=true")
            built.append(name)
    return built


def _build(run: IntegrationRun, source: str, inputs: Path, option: str) -> None:
    name = source if source.endswith("-eval") else inputs.name
    out = run.out / "shards" / name
    build: list[str | Path] = [*_ONELLM, "shards", "build", source, inputs, out, "-o", option]
    run.run_command("benchmarks", build)


def _find_seen(run: IntegrationRun, evaluation: Path) -> dict[str, Any]:
    """Search the benchmarks in training data that has some of their pictures, and score the rest.

    Returns:
        What was to be found, what was, and both tables of `onellm score --without`.
    """
    copies = write_seen(run.out / "media", run.out / "benchmarks" / "seen")
    _build(run, "folder", run.out / "benchmarks" / "seen", "modality=image")
    out, shards = run.out / "evaluation" / "overlap", run.out / "shards"
    searched = [shards / "seen", *sorted(shards.glob("*-eval"))]
    run.run_command("overlap", [*_ONELLM, "shards", "overlap", *searched, "--out", out])
    lines = (out / "media.txt").read_text(encoding="utf-8").splitlines()
    found = Counter(line.partition("/")[0] for line in lines)
    score: list[str | Path] = [*_ONELLM, "score", evaluation, "--without", out / "media.txt"]
    for name in SHOW_PICTURES:
        score += ["--task", name]
    return {
        "expected": {name: asked * len(copies) for name, asked in SHOW_PICTURES.items()},
        "found": dict(sorted(found.items())),
        "without": run.run_command("score", score).strip().splitlines(),
    }


def _answer(run: IntegrationRun, stage: str, tasks: Any) -> Path:
    """Answer and score benchmarks with the model of a stage; returns the folder."""
    out = run.out / "evaluation" / stage
    model = run.out / stage / run_files.MODEL
    evaluate = [*_ONELLM, "evaluate", model, *tasks, "--data", run.out / "shards"]
    said = run.run_command(f"evaluate-{stage}", [*evaluate, "--out", out])
    run.log(f"{stage}: {said.strip().splitlines()[-1]}")
    run.run_command("score", [*_ONELLM, "score", out])
    return out


def _count(folder: Path) -> dict[str, int]:
    """Questions and answers of a task; what is lost between them is a fault."""
    settings = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:
        return {"questions": int(settings["questions"]), "answered": sum(1 for _ in file)}
