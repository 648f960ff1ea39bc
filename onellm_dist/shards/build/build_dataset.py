"""Build a dataset from Python: what `onellm shards build` does, as a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.build.builder import build_planned
from onellm_dist.shards.build.registry import complete_options, get_source
from onellm_dist.shards.build.request import BuildRequest
from onellm_dist.shards.build.staging import QUARANTINE, open_staging_folder
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.format.names import make_dataset_name
from onellm_dist.shards.sources.base import BuildReport, Source
from onellm_dist.shards.storage.paths import StoragePath, to_storage_path


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
    """Build a dataset folder (or, with `toyworld`, a folder of datasets).

    `output` appears only when it is complete. If the build of a planned source is stopped, the same
    call resumes it; several processes that make the same call share the work.

    Args:
        source: a source's name: "folder", "toyworld", ... (see `all_sources`).
        inputs: what is read, a path or an fsspec URL; None for generated data.
        output: the new folder, a path or an fsspec URL; absent or empty, but for `overwrite`.
        options: the source's own and the builder's (see `get_options`); texts are converted.
        workers: processes; the bytes that are written do not depend on it.
        seed: for sources that draw or shuffle.
        overwrite: replace datasets at `output`, and an unfinished build of something else.
        restart: begin an unfinished build anew, also of the same request (one process alone).
        task: this process's share of the shards, for several processes and a remote store.

    Returns:
        What was built and left out; `format_summary` makes lines of it.

    Raises:
        UsageError: a wrong source or option, a missing input, or an occupied output.
        OneLLMError: the build was given up; nothing is kept at `output`.
    """
    chosen = get_source(source)
    target, found = to_storage_path(output), find_inputs(chosen, inputs)
    if workers < 1:
        raise UsageError(
            f"workers={workers} is below 1.", "at least one process must build.", "give 1 or more."
        )
    own, settings = complete_options(chosen, options or {}, name=make_dataset_name(target))
    try:
        if settings is None:
            return _build_by_source(chosen, found, target, own, workers, seed, overwrite=overwrite)
        assert found is not None
        return build_planned(
            BuildRequest(chosen, found, target, seed, own, settings),
            workers=workers,
            overwrite=overwrite,
            restart=restart,
            task=task or ArrayTask(),
        )
    except OSError as error:
        raise OneLLMError(
            f"{error.filename or output}: {error.strerror or error}.",
            f"the build was given up; nothing is kept at {output}.",
            "remove the cause and build again (finished shards are kept).",
        ) from error


def _build_by_source(
    source: Source,
    inputs: StoragePath | None,
    target: StoragePath,
    options: Mapping[str, Any],
    workers: int,
    seed: int,
    *,
    overwrite: bool,
) -> BuildReport:
    """Let a source that makes its data itself write it."""
    if not isinstance(target, Path):
        raise UsageError(
            f"source {source.name!r} writes to local folders only.",
            f"{target} is remote.",
            "build locally and copy the folder.",
        )
    assert source.build is not None
    with open_staging_folder(target, overwrite=overwrite) as folder:
        report = source.build(inputs, folder, workers=workers, seed=seed, **options)
    return report if report is not None else BuildReport(0)


def find_inputs(source: Source, inputs: Path | str | None) -> StoragePath | None:
    """Return the path of a source's input; None: the source makes its data.

    Raises:
        UsageError: the input is missing.
    """
    if inputs is None:
        if source.needs_input:
            raise UsageError(
                f"source {source.name!r} needs an input.",
                "there is nothing to read.",
                f"onellm shards build {source.name} IN OUT",
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


def format_summary(report: BuildReport, output: Path | str) -> str:
    """Format the lines that a command prints after a build."""
    first = format_count(report.samples, "sample") if report.samples else "built"
    lines = [f"{to_storage_path(output)}: {first}", *report.notes]
    if report.quarantined:
        total, listed = max(report.failures, len(report.quarantined)), len(report.quarantined)
        lines.append(
            f"left out: {total} (all in {to_storage_path(output) / QUARANTINE})"
            + (f"; of the first {listed}:" if total > listed else "")
        )
        reasons = Counter(q.reason.split(":")[0] for q in report.quarantined)
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
        lines += [f"  {q.file}: {q.reason}" for q in report.quarantined[:5]]
    return "\n".join(lines)
