"""Where the dataset of a benchmark is; without torch."""

from __future__ import annotations

from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.evaluation.tasks import Task


def find_dataset(data: Path, task: Task) -> Path:
    """The dataset of a task below a folder: `gqa-eval`, `gqa`, or the folder itself.

    Raises:
        UsageError: there is none.
    """
    names = (f"{task.name}-eval", task.name, "")
    for name in names:
        if (data / name / "manifest.json").is_file():
            return data / name
    raise UsageError(
        f"{data}: there is no {task.name}-eval",
        f"the questions of {task.title} are a dataset of shards.",
        f"build it: onellm shards build {task.name}-eval IN {data / f'{task.name}-eval'}",
    )
