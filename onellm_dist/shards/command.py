"""`onellm shards build` and `index`: from what the user wrote to a request, and back to lines for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.common.errors import EXIT_DONE, OneLLMError, UsageError
from onellm_dist.shards.build.arguments import format_source_help
from onellm_dist.shards.build.builder import BuildRequest, build_planned, dry_run
from onellm_dist.shards.build.registry import complete_options, get_source
from onellm_dist.shards.build.staging import QUARANTINE, open_staging_folder
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.format.names import make_dataset_name, parse_modalities
from onellm_dist.shards.sources.base import BuildReport, Source
from onellm_dist.shards.storage.paths import StoragePath, to_storage_path
from onellm_dist.shards.tools.index_existing import index_existing_shards


def build_dataset(
    source: str,
    inputs: Path | str | None,
    output: Path | str,
    *,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    seed: int = 0,
    overwrite: bool = False,
    restart: bool = False,
    task: ArrayTask | None = None,
) -> BuildReport:
    """Builds a dataset folder (or, for `toyworld`, a folder of them); `output` appears only when it is whole.

    A planned source's build that was stopped goes on where it was when it is called again; several processes that are called
    alike share the work.

    Args:
        source: "folder", "toyworld", ... (see `all_sources`).
        inputs: what is read, a path or an fsspec URL; None for generated data.
        output: the new folder, a path or an fsspec URL. Must be absent or empty, or hold datasets and `overwrite` be given.
        options: the source's own and the builder's (`options_of`); texts are converted to their types.
        workers: processes; the output's bytes do not depend on it.
        seed: for sources that draw or shuffle.
        overwrite: replace datasets that stand at `output`, and an unfinished build of something else.
        restart: begin an unfinished build of the same anew too; of several processes none may be asked for it.
        task: this process builds a fixed part of the shards (see `Task`); needed for remote outputs of several processes.

    Returns:
        What was built and what was left out (`summary` makes lines of it).

    Raises:
        UsageError: unknown source or option, wrong type, missing input, occupied output.
        OneLLMError: the build was given up; nothing stands under `output`.
    """
    kind = get_source(source)
    where, what = to_storage_path(output), _inputs(kind, inputs)
    if workers < 1:
        raise UsageError(
            f"workers={workers} is below 1.", "somebody must do the work.", "give 1 or more."
        )
    own, settings = complete_options(kind, options or {}, name=make_dataset_name(where))
    try:
        if settings is not None:
            assert what is not None
            request = BuildRequest(kind, what, where, seed, own, settings)
            return build_planned(
                request, workers=workers, overwrite=overwrite, restart=restart, task=task or ArrayTask()
            )
        if not isinstance(where, Path):
            raise UsageError(
                f"source {source!r} writes to local folders only.",
                f"{output} is remote.",
                "build locally and copy the folder.",
            )
        assert kind.build is not None
        with open_staging_folder(where, overwrite=overwrite) as folder:
            report = kind.build(what, folder, workers=workers, seed=seed, **own)
    except OSError as error:
        raise OneLLMError(
            f"{error.filename or output}: {error.strerror or error}.",
            f"the build was given up; nothing stands under {output}.",
            "mend it and build again (shards that were finished are kept).",
        ) from error
    return report if report is not None else BuildReport(0)


def _inputs(kind: Source, inputs: Path | str | None) -> StoragePath | None:
    """The input as a place.

    Raises:
        UsageError: it is missing.
    """
    if inputs is None:
        if kind.needs_input:
            raise UsageError(
                f"source {kind.name!r} needs an input.",
                "there is nothing to read.",
                f"onellm shards build {kind.name} IN OUT",
            )
        return None
    found = to_storage_path(inputs)
    if not found.exists():
        raise UsageError(
            f"{inputs}: there is no such file or folder.",
            "there is nothing to read.",
            "check the path.",
        )
    return found


def build_recipe(
    recipe: Path, *, overwrite: bool = False, **overrides: Any
) -> tuple[Path, BuildReport]:
    """Builds from a dataset recipe (YAML): `source`, `inputs`, `out`, `workers`, `seed`, and the source's `options`.

    `inputs` and `out` are relative to the current folder. `overrides` replace top-level keys, or options by name.

    Returns:
        (the output folder, the report).

    Raises:
        UsageError: no readable recipe, or a key that is not understood.
    """
    values, options = read_recipe(recipe, **overrides)
    return Path(values["out"]), _build(values, options, overwrite=overwrite, task=ArrayTask())


def _build(
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    overwrite: bool,
    restart: bool = False,
    task: ArrayTask,
) -> BuildReport:
    return build_dataset(
        values["source"],
        values.get("inputs"),
        values["out"],
        options=options,
        workers=int(values.get("workers", 1)),
        seed=int(values.get("seed", 0)),
        overwrite=overwrite,
        restart=restart,
        task=task,
    )


def read_recipe(recipe: Path, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(top-level values, options) of a dataset recipe, overrides put in.

    Raises:
        UsageError: no readable recipe, or a key that is not understood.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{recipe}: {error}",
            "the recipe cannot be read.",
            "see shards/folder.yaml for an example.",
        ) from error
    top = {"source", "inputs", "out", "workers", "seed", "options"}
    if not isinstance(content, dict) or not isinstance(content.get("options") or {}, dict):
        raise UsageError(
            f"{recipe} is no mapping of keys to values.",
            "it is no dataset recipe.",
            "see shards/folder.yaml for an example.",
        )
    values = {k: v for k, v in content.items() if k != "options"}
    options = dict(content.get("options") or {})
    for key, value in overrides.items():
        (values if key in top else options)[key] = value
    unknown, missing = sorted(set(values) - top), sorted({"source", "out"} - values.keys())
    if unknown or missing:
        faults = [*(f"unknown key {k!r}" for k in unknown), *(f"no key {k!r}" for k in missing)]
        raise UsageError(
            f"{recipe}: {', '.join(faults)}.",
            "the recipe is not built as written.",
            f"its keys are: {', '.join(sorted(top))}.",
        )
    return values, options


def build_command(
    source: str,
    paths: list[Path],
    options: list[str],
    *,
    workers: int,
    seed: int,
    overwrite: bool,
    restart: bool = False,
    task: str = "0/1",
    dry_run: bool = False,
) -> int:
    """`onellm shards build`: SOURCE [IN] OUT with `key=value` options, or a dataset recipe (YAML).

    What is given here and is not the default replaces what the recipe says.

    Returns:
        The exit code.

    Raises:
        OneLLMError: as `build_dataset`.
    """
    number = ArrayTask.parse(task)
    if source.endswith((".yaml", ".yml")):
        given: dict[str, Any] = dict(zip(("out", "inputs"), reversed(paths), strict=False))
        given.update(
            {k: v for k, v, default in (("workers", workers, 1), ("seed", seed, 0)) if v != default}
        )
        values, kind_options = read_recipe(Path(source), **given, **_pairs(options))
    else:
        kind = get_source(source)
        if "help" in options:
            print(format_source_help(kind))
            return EXIT_DONE
        expected = 2 if kind.needs_input else 1
        if len(paths) != expected:
            raise UsageError(
                f"source {source!r} takes {'IN and OUT' if kind.needs_input else 'OUT alone'}, and {len(paths)} paths were given.",
                "it is not clear what is read and what is written.",
                f"onellm shards build {source} {'IN OUT' if kind.needs_input else 'OUT'}",
            )
        values = {
            "source": source,
            "inputs": paths[0] if kind.needs_input else None,
            "out": paths[-1],
            "workers": workers,
            "seed": seed,
        }
        kind_options = dict(_pairs(options))
    if dry_run:
        print(_dry_run(values, kind_options))
        return EXIT_DONE
    print(
        summary(
            _build(values, kind_options, overwrite=overwrite, restart=restart, task=number),
            values["out"],
        )
    )
    return EXIT_DONE


def _dry_run(values: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    kind = get_source(values["source"])
    inputs = _inputs(kind, values.get("inputs"))
    own, settings = complete_options(
        kind, options, name=make_dataset_name(to_storage_path(values["out"]))
    )
    if settings is None or inputs is None:
        raise UsageError(
            f"source {kind.name!r} has no dry run.", "it makes its data as it writes.", "build it."
        )
    request = BuildRequest(
        kind, inputs, to_storage_path(values["out"]), int(values.get("seed", 0)), own, settings
    )
    return dry_run(request, workers=int(values.get("workers", 1)))


def _pairs(options: list[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise UsageError(
                f"option {option!r} is no key=value.",
                "its value is not known.",
                "write -o key=value; -o help lists the keys.",
            )
    return dict(option.split("=", 1) for option in options)


def index_command(
    paths: list[Path], modalities: list[str], *, workers: int = 1, again: bool = False
) -> int:
    """`onellm shards index`: indexes tars and folders of tars. Returns the exit code.

    Args:
        workers: processes.
        again: also tars that have an index which fits.
    """
    wanted = parse_modalities(",".join(modalities)) if modalities else None
    for path in paths:
        done = index_existing_shards(path, modalities=wanted, workers=workers, again=again)
        where = (
            f"; it is a dataset now ({done.manifest})"
            if done.manifest
            else "; to train from it, index its folder"
        )
        kept = f" ({done.kept} had an index already)" if done.kept else ""
        print(
            f"{path}: {done.tars} tar{'s' if done.tars != 1 else ''}, {done.samples} samples indexed{kept}{where}"
        )
    return EXIT_DONE


def summary(report: BuildReport, out: Path | str) -> str:
    """The lines a command prints after a build."""
    lines = (
        [f"{out}: {report.samples} samples", *report.notes]
        if report.samples
        else [f"{out}: built", *report.notes]
    )
    if report.quarantined:
        total, named = max(report.failures, len(report.quarantined)), len(report.quarantined)
        lines.append(
            f"left out: {total} (all in {to_storage_path(out) / QUARANTINE})"
            + (f"; of the first {named}:" if total > named else "")
        )
        kinds = Counter(q.reason.split(":")[0] for q in report.quarantined)
        lines += [f"  {count} x {kind}" for kind, count in kinds.most_common()]
        lines += [f"  {q.file}: {q.reason}" for q in report.quarantined[:5]]
    return "\n".join(lines)
