"""What a recipe names must exist: looked for before ranks spend their time on imports.

Nothing here imports torch or opens more than a dataset's manifest. What lies at a URL is found out
when it is opened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import find_module
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import EngineSection, MixtureEntry, RunConfig
from onellm_dist.config.section import Section
from onellm_dist.config.train_sections import OptimSection, TrainSection
from onellm_dist.config.valid_parts import ValidParts
from onellm_dist.data.epochs import resolve_epochs
from onellm_dist.data.exclusions import read_exclusions
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.train.records.applied_resumes import was_applied

Sections = Mapping[str, Section]
Values = Mapping[str, Any]
"""The valid values of one section, by field."""


def load_checked_config(recipe: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a recipe, look for everything that it names, and replace `train.epochs` by steps.

    Raises:
        UsageError: the recipe is wrong, or something that it names is missing; all problems are
            listed.
    """
    return resolve_epochs(load_config(recipe, overrides, find_problems=find_problems))


def find_problems(valid: ValidParts) -> list[str]:
    """What is wrong with the valid parts of a recipe, one line each."""
    run, data = valid.values.get("run", {}), valid.values.get("data", {})
    errors = (
        *_check_run(run),
        *_check_model(valid.values.get("model", {})),
        *_check_data(data),
        *_check_parts(valid),
        *_check_checkpoint(valid.values.get("checkpoint", {}), run),
    )
    return [_format(error) for error in errors]


def find_shape_problems(valid: ValidParts) -> list[str]:
    """`find_problems` of the parts that decide shapes alone: data and earlier runs may be absent.

    A plan is made before there is data, often on another machine.
    """
    errors = (*_check_model(valid.values.get("model", {})), *_check_parts(valid))
    return [_format(error) for error in errors]


def _format(error: UsageError) -> str:
    """The first line of an error and its remedy, as the other problems of a recipe."""
    what = error.what.rstrip(".")
    return f"{what}: {error.do}" if error.do else what


def _collect(check: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[UsageError]:
    try:
        check(*arguments, **options)
    except UsageError as error:
        yield error


def _check_run(run: Values) -> Iterator[UsageError]:
    folder: Path | None = run.get("dir")
    if folder is None:
        return
    above = (folder, *folder.absolute().parents)
    existing = next((path for path in above if path.exists()), None)
    if existing is not None and not existing.is_dir():
        yield UsageError(
            f"run.dir={folder} cannot be created: {existing} is not a directory",
            do="choose another run.dir",
        )


def _check_model(model: Values) -> Iterator[UsageError]:
    path: Path | None = model.get("path")
    if path is None:
        return
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "no such folder"
        yield UsageError(
            f"model.path={path}: {what}",
            do="give a directory written by save_pretrained, `onellm convert` or a finished run",
        )


def _check_data(data: Values) -> Iterator[UsageError]:
    """The datasets, if it is known where they lie, and the list of excluded samples."""
    mixture: tuple[MixtureEntry, ...] = data.get("mixture", ())
    root, follow_links = data.get("root"), data.get("follow_links")
    for entry in mixture:
        location = entry.path if root is None else entry.locate(root)
        if not math.isfinite(entry.weight):
            yield UsageError(
                f"data.mixture: the weight {entry.weight} of {location} is not a finite number",
                do="use a number above 0",
            )
        if root is not None and follow_links is not None and isinstance(location, Path):
            yield from _collect(open_dataset, location, follow_links=follow_links)
    if data.get("exclude") is not None:
        yield from _collect(read_exclusions, data["exclude"])


def _check_parts(valid: ValidParts) -> Iterator[UsageError]:
    """The engine, the optimizer, trackers and callbacks."""
    train = valid.values.get("train", {})
    yield from _check_engine(valid.sections, train.get("precision"))
    yield from _check_optim(valid)
    trackers: tuple[str, ...] = valid.values.get("track", {}).get("trackers", ())
    if trackers:
        from onellm_dist.train.callbacks.trackers import tracker_class

        for name in trackers:
            yield from _collect(tracker_class, name)
    for name in train.get("callbacks", ()):
        if ":" in name:
            yield from _collect(find_module, name, key="train.callbacks")


def _check_engine(sections: Sections, precision: str | None) -> Iterator[UsageError]:
    """The engine, if the precision is known."""
    from onellm_dist.train.engine.compile_check import check_compile
    from onellm_dist.train.engine.frozen_weights import check_frozen_weights
    from onellm_dist.train.engine.select import get_engine

    engine = cast("EngineSection | None", sections.get("engine"))
    train = cast("TrainSection | None", sections.get("train"))
    if engine is None or precision is None:
        return
    wrong = [*_collect(get_engine(engine.name).check, engine, bf16=precision == "bf16")]
    yield from wrong
    if train is not None:
        yield from _collect(check_frozen_weights, engine, train)
        if not wrong:
            yield from _collect(check_compile, engine, train)


def _check_optim(valid: ValidParts) -> Iterator[UsageError]:
    """The optimizer, with what is known of the rules and the length of the run."""
    from onellm_dist.train.optim.optimizers import check_optim

    optim = cast("OptimSection | None", valid.sections.get("optim"))
    if optim is None:
        return
    train = valid.values.get("train", {})
    rules = None if "train.parameters" in valid.shortened else train.get("parameters")
    # Where epochs are given, or may be, it is not clear that the steps hold.
    steps = train.get("steps") if train.get("epochs", "?") is None else None
    yield from _collect(check_optim, optim, rules, steps)


def _check_checkpoint(checkpoint: Values, run: Values) -> Iterator[UsageError]:
    """A named checkpoint; a requeued job that has applied it may have removed it since."""
    resume, folder = checkpoint.get("resume"), run.get("dir")
    if folder is None or not isinstance(resume, Path) or resume.is_dir():
        return
    if not was_applied(folder, resume, os.environ):
        yield UsageError(
            f"checkpoint.resume={resume}: no complete checkpoint there (no such folder)",
            do="give a step-... folder of a run's checkpoints/, or auto",
        )
