"""Results of a run's checkpoints on benchmarks: which are there, and how one is recorded.

RUN/evaluation/step-00000100-1a2b3c4d/    a checkpoint, named with its checksum: task.json and
                                          so on, as `onellm evaluate` writes them
RUN/validation.jsonl                      a line with `tasks` for each checkpoint, and another one
                                          where tasks were added later
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import repair_last_line
from onellm_dist.common.run_files import EVALUATION, VALIDATION
from onellm_dist.config.schema import RunConfig, ValidationSection
from onellm_dist.evaluation.datasets import find_dataset
from onellm_dist.evaluation.score import TaskScore
from onellm_dist.evaluation.tasks import get_task

ANSWERED_MODEL = "model.answered"
"""A checkpoint's converted model gets this name before its scores are recorded, and is removed."""


def get_section(config: RunConfig) -> ValidationSection | None:
    """The `data.validation` of a recipe with tasks; None without."""
    section = config.data.validation
    return section if section is not None and section.tasks else None


def find_data(config: RunConfig, section: ValidationSection) -> Path:
    """Check the tasks of a recipe, and return the folder of their datasets.

    Raises:
        UsageError: a task is unknown, or its dataset is not there.
    """
    root = section.tasks_data or config.data.root
    if not isinstance(root, Path):
        raise UsageError(
            f"data.validation.tasks: data.root={root} is not a folder",
            "questions are read from a disk.",
            "set data.validation.tasks_data to the folder of gqa-eval and so on.",
        )
    for name in section.tasks:
        find_dataset(root, get_task(name))
    return root


def list_recorded(run_dir: Path) -> dict[str, set[str]]:
    """Names of the checkpoints with scores in `validation.jsonl`, each with its tasks there."""
    try:
        lines = (run_dir / VALIDATION).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, set[str]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(entry, dict) and isinstance(entry.get("tasks"), dict):
            found.setdefault(str(entry.get("checkpoint")), set()).update(entry["tasks"])
    return found


def remove_answered_models(run_dir: Path) -> None:
    """Remove models that have answered and were left by a kill; see `ANSWERED_MODEL`."""
    for folder in (run_dir / EVALUATION).glob(f"*/{ANSWERED_MODEL}"):
        shutil.rmtree(folder)


def get_folder(run_dir: Path, name: str) -> Path:
    """What a checkpoint's answers are in.

    Args:
        run_dir: the run directory.
        name: of the checkpoint, with its checksum.
    """
    return run_dir / EVALUATION / name


def build_entry(
    name: str, steps_done: int, scores: Sequence[TaskScore], seconds: float
) -> dict[str, Any]:
    """The line of a checkpoint; `incomplete` has the tasks of which questions are missing.

    Args:
        name: of the checkpoint, with its checksum.
        steps_done: its steps.
        scores: of its tasks.
        seconds: what its evaluation took.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for score in scores:
        own = tasks.setdefault(score.task.name, {})
        for measure in score.measures:
            interval = measure.compute_interval()
            own[measure.name] = {
                "value": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "n": measure.n,
            }
    return {
        "steps_done": steps_done,
        "checkpoint": name,
        "tasks": tasks,
        "incomplete": {
            score.task.name: {"answered": len(score.answers), "of": score.whole}
            for score in scores
            if not score.is_complete
        },
        "evaluation_seconds": seconds,
    }


def append_entry(run_dir: Path, entry: Mapping[str, Any], *, alone: bool) -> None:
    """Append a line to `validation.jsonl`.

    Args:
        run_dir: the run directory.
        entry: see `build_entry`.
        alone: whether no start of the run is running, so that a torn line may be removed.
    """
    path = run_dir / VALIDATION
    if alone:
        repair_last_line(path)
    with path.open("ab") as file:  # one write: a start that is running may append too
        file.write((json.dumps(entry) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def list_charts(entry: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a line as trackers take them: `tasks/mme/perception` -> 812.5.

    A task of which questions are missing has its share of answered ones, `tasks/mme/answered`.
    """
    shares = {
        f"tasks/{task}/answered": part["answered"] / part["of"]
        for task, part in entry["incomplete"].items()
    }
    return shares | {
        f"tasks/{task}/{measure.replace(' ', '_')}": float(values["value"])
        for task, measures in entry["tasks"].items()
        for measure, values in measures.items()
    }
