"""`onellm shards build` and `index`: from the command line to a request, and lines for the user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.output import write_output
from onellm_dist.shards.build.arguments import format_source_help
from onellm_dist.shards.build.build_dataset import find_inputs, format_summary
from onellm_dist.shards.build.dry_run import describe_build
from onellm_dist.shards.build.recipe import build_values, read_recipe
from onellm_dist.shards.build.registry import complete_options, get_source
from onellm_dist.shards.build.request import BuildRequest
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.format.names import make_dataset_name, parse_modalities
from onellm_dist.shards.sources.base import Source
from onellm_dist.shards.storage.paths import to_storage_path
from onellm_dist.shards.tools.index_existing import index_existing_shards


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
    """Run `onellm shards build`: SOURCE [IN] OUT with `key=value` options, or a dataset recipe.

    What is given here, and is not the default, replaces what the recipe says.

    Args:
        source: a source's name, or the path of a recipe.
        paths: input and output.
        options: `key=value` each.
        workers: processes.
        seed: for sources that draw or shuffle.
        overwrite: replace datasets at the output.
        restart: first discard an unfinished build.
        task: this process's share, INDEX/COUNT.
        dry_run: describe the build instead.

    Returns:
        The exit code.

    Raises:
        OneLLMError: as `build_dataset`.
    """
    share = ArrayTask.parse(task)
    if source.endswith((".yaml", ".yml")):
        given: dict[str, Any] = dict(zip(("out", "inputs"), reversed(paths), strict=False))
        given |= {} if workers == 1 else {"workers": workers}
        given |= {} if seed == 0 else {"seed": seed}
        values, own = read_recipe(Path(source), **given, **_parse_options(options))
    else:
        chosen = get_source(source)
        if "help" in options:
            write_output(format_source_help(chosen))
            return EXIT_DONE
        values = _read_paths(chosen, paths) | {"workers": workers, "seed": seed}
        own = dict(_parse_options(options))
    if dry_run:
        write_output(_describe(values, own))
        return EXIT_DONE
    report = build_values(values, own, overwrite=overwrite, restart=restart, task=share)
    write_output(format_summary(report, values["out"]))
    return EXIT_DONE


def _read_paths(source: Source, paths: list[Path]) -> dict[str, Any]:
    wanted = ("inputs", "out") if source.needs_input else ("out",)
    if len(paths) != len(wanted):
        takes = "IN and OUT" if source.needs_input else "OUT alone"
        raise UsageError(
            f"source {source.name!r} takes {takes}, and {len(paths)} paths were given.",
            "it is not clear what is read and what is written.",
            f"onellm shards build {source.name} {'IN OUT' if source.needs_input else 'OUT'}",
        )
    return {"source": source.name, "inputs": None, **dict(zip(wanted, paths, strict=True))}


def _describe(values: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    source = get_source(values["source"])
    inputs = find_inputs(source, values.get("inputs"))
    out = to_storage_path(values["out"])
    own, settings = complete_options(source, options, name=make_dataset_name(out))
    if settings is None or inputs is None:
        raise UsageError(
            f"source {source.name!r} has no dry run.",
            "it makes its data as it writes.",
            "build it.",
        )
    request = BuildRequest(source, inputs, out, int(values.get("seed", 0)), own, settings)
    return describe_build(request, workers=int(values.get("workers", 1)))


def _parse_options(options: list[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise UsageError(
                f"option {option!r} is not key=value.",
                "its value is not known.",
                "write -o key=value; -o help lists the keys.",
            )
    return dict(option.split("=", 1) for option in options)


def index_command(
    paths: list[Path],
    modalities: list[str],
    *,
    workers: int = 1,
    again: bool = False,
    follow_links: bool = False,
    media: bool = False,
) -> int:
    """Run `onellm shards index`: index tars and folders of tars.

    Args:
        paths: tars and folders.
        modalities: what every sample has; empty: inferred.
        workers: processes.
        again: also index tars whose index fits.
        follow_links: whether tars may be links that lead out of their folder.
        media: also list the media of each sample, with their sizes.

    Returns:
        The exit code.
    """
    wanted = parse_modalities(",".join(modalities)) if modalities else None
    for path in paths:
        done = index_existing_shards(
            path,
            modalities=wanted,
            workers=workers,
            again=again,
            follow_links=follow_links,
            media=media,
        )
        tars = format_count(done.tars, "tar")
        kept = f" ({done.kept} had an index already)" if done.kept else ""
        state = (
            f"it is a dataset now ({done.manifest})"
            if done.manifest
            else "to train from it, index its folder"
        )
        write_output(
            f"{path}: {tars}, {format_count(done.samples, 'sample')} indexed{kept}; {state}"
        )
        for note in done.notes:
            write_output(f"{path}: {note}")
    return EXIT_DONE
