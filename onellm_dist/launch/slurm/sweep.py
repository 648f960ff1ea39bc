"""Sweeps: a Slurm array with one run for each combination of some keys' values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_config
from onellm_dist.config.paths import MOST_NAME
from onellm_dist.launch.slurm.job import SweepTask

MOST_TASKS = 1000
"""Slurm's default `MaxArraySize` is 1001."""
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""


def parse_sweep(items: Sequence[str]) -> list[tuple[str, ...]]:
    """Parse `KEY=VALUE,VALUE,...` into the overrides of each run: every combination of values.

    Commas in brackets, braces and quotes belong to a value.

    Args:
        items: one for each key that varies; the last one varies fastest.

    Raises:
        UsageError: an item has another form, a key or a value is there twice, `run.dir` varies, or
            there are too many runs.
    """
    choices: dict[str, list[str]] = {}
    for item in items:
        key, sep, text = item.partition("=")
        values = list(_split_values(text))
        if not sep or not key or not all(values):
            raise UsageError(
                f"--array {item!r} is not KEY=VALUE,VALUE,...",
                "it says which values a key has in the runs.",
                "write it like --array optim.lr=1e-5,2e-5.",
            )
        problem = "it is the same run twice" if len(set(values)) < len(values) else ""
        problem = problem or ("the key is swept twice" if key in choices else "")
        if key == "run.dir":
            problem = "each run has a directory of its own, below run.dir"
        if problem:
            raise UsageError(
                f"--array {item!r}: {problem}",
                "two runs would write the same directory.",
                "name each key and each value once; set run.dir with --set.",
            )
        choices[key] = values
    runs = [
        tuple(f"{key}={value}" for key, value in zip(choices, values, strict=True))
        for values in product(*choices.values())
    ]
    if len(runs) > MOST_TASKS:
        raise UsageError(
            f"--array: {len(runs)} combinations of values",
            f"an array has at most {MOST_TASKS} jobs here.",
            "sweep fewer keys or values at a time.",
        )
    return runs


def make_sweep(recipe: Path, overrides: Sequence[str], items: Sequence[str]) -> list[SweepTask]:
    """Make the runs of a sweep, and check the recipe of each.

    Args:
        recipe: a recipe file, or the name of one that ships.
        overrides: key=value of all runs.
        items: what varies, as `parse_sweep` takes it; none: there is no sweep.

    Raises:
        UsageError: the sweep is wrong, or the recipe with some of its values.
    """
    if not items:
        return []
    tasks: list[SweepTask] = []
    folder = load_config(recipe, overrides).run.dir
    for varied in parse_sweep(items):
        run_dir = folder / _make_name(varied, len(tasks))
        own = (*varied, f"run.dir={run_dir}")
        load_config(recipe, [*overrides, *own])
        tasks.append(SweepTask(run_dir, own))
    if len({task.run_dir for task in tasks}) < len(tasks):  # values that differ in odd characters
        return [
            SweepTask(
                numbered := task.run_dir.with_name(f"{number}-{task.run_dir.name}"),
                (*task.overrides[:-1], f"run.dir={numbered}"),
            )
            for number, task in enumerate(tasks)
        ]
    return tasks


def _split_values(text: str) -> Iterator[str]:
    value, depth, quote = "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
        if character == "," and depth <= 0 and not quote:
            yield value.strip()
            value = ""
        else:
            value += character
    if quote or depth:
        raise UsageError(
            f"--array {text}: a quote or a bracket is not closed",
            "it is not clear where one value ends and the next begins.",
            "close it, or write the quote within quotes of the other kind.",
        )
    yield value.strip()


def _make_name(varied: Sequence[str], number: int) -> str:
    """The folder of a run, named by what varies: `optim.lr=1e-5_run.seed=0`."""
    name = "_".join(re.sub(r"[^\w.=+-]+", "_", item) for item in varied)
    return name if len(name.encode("utf-8")) <= MOST_NAME // 2 else f"run-{number}"
