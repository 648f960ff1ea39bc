"""One build, from its request to the finished dataset.

If it is stopped at any moment, it resumes from there when the same is requested again. The
unfinished build lies in a folder of its own (unfinished.py).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import STAGED
from onellm_dist.common.progress import progress
from onellm_dist.shards.build.finish import finish_dataset, format_quarantine, read_all_records
from onellm_dist.shards.build.plan import PLAN, PlanVersionError, load_plan
from onellm_dist.shards.build.request import BuildMode, BuildRequest
from onellm_dist.shards.build.staging import (
    QUARANTINE,
    empty_folder,
    get_failed_quarantine_path,
    get_staging_folder,
    lock_folder,
    refuse_output,
    replace_output,
    try_lock,
)
from onellm_dist.shards.build.task import (
    DONE,
    BuildCounts,
    BuildJob,
    NoSamplesLeftError,
    TooManyFailuresError,
)
from onellm_dist.shards.build.unfinished import (
    DATASET,
    RENAMING,
    SCRATCH,
    FinishedByOthersError,
    hold_lease,
    identify_manifest,
    open_plan,
    remove_build_folder,
    remove_if_nothing_done,
)
from onellm_dist.shards.build.workers import ArrayTask, build_shard_tasks
from onellm_dist.shards.format.dataset import MANIFEST, Manifest
from onellm_dist.shards.format.energon import META, write_energon
from onellm_dist.shards.sources.base import BuildReport
from onellm_dist.shards.storage.paths import StoragePath, remove_tree, write_file

_FINISHED_BY_OTHERS = "the other processes had already finished"


def build_planned(
    request: BuildRequest,
    *,
    workers: int,
    overwrite: bool,
    task: ArrayTask,
    restart: bool = False,
) -> BuildReport:
    """Build the dataset of a planned source, or this process's share of it.

    Args:
        request: what is built.
        workers: processes.
        overwrite: replace a dataset at the output, or an unfinished build of something else.
        task: this process's share.
        restart: first discard an unfinished build, also of the same request. Only for a process
            that builds alone (others would lose their work).

    Raises:
        UsageError: the output is occupied, or holds an unfinished build of something else.
        TooManyFailuresError: too many samples are bad; nothing is kept at the output.
    """
    if restart and _is_one_of_several(task):
        raise UsageError(
            "--restart is given to one of several processes.",
            "each would discard what the others have built.",
            "give it to one process, and start the others without it when that one builds.",
        )
    out = request.out
    if isinstance(out, Path):
        out = Path(os.path.abspath(out))
    manifest = out / MANIFEST
    if not overwrite and _is_one_of_several(task) and manifest.exists():
        return BuildReport(0, notes=(_FINISHED_BY_OTHERS,))
    mode = BuildMode(workers, overwrite, restart, task, identify_manifest(manifest))
    try:
        if isinstance(out, Path):
            return _build_local(request, out, mode)
        return _build_remote(request, mode)
    except (FileNotFoundError, FinishedByOthersError):
        if identify_manifest(manifest) in (None, mode.manifest_before):
            raise
        # The build's folder was removed while this process worked in it.
        return BuildReport(0, notes=(_FINISHED_BY_OTHERS,))


def _is_one_of_several(task: ArrayTask) -> bool:
    """Check for a process of an array or of one srun; a late one of them has nothing to do."""
    return task.count > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _build_local(request: BuildRequest, out: Path, mode: BuildMode) -> BuildReport:
    refuse_output(out, overwrite=mode.overwrite)
    base = get_staging_folder(out)
    with (
        lock_folder(base, out, shared=True) as descriptor,
        remove_if_nothing_done(base, descriptor),
    ):
        if mode.restart:
            if not try_lock(descriptor, shared=False):
                raise UsageError(
                    f"{out} is being built by another process.",
                    "its work would be lost.",
                    "wait for it, or end it first.",
                )
            empty_folder(base)
            try_lock(descriptor, shared=True)
        return _build(request, base, base / SCRATCH, descriptor, mode)


def _build_remote(request: BuildRequest, mode: BuildMode) -> BuildReport:
    base, manifest = request.out / ".building", request.out / MANIFEST
    if mode.restart:
        remove_build_folder(base)
    if mode.manifest_before is not None:
        if not mode.overwrite:
            return _report_finished(request, base)
        manifest.unlink()
        mode = replace(mode, manifest_before=None)
    with tempfile.TemporaryDirectory(prefix="onellm-") as scratch:
        return _build(request, base, Path(scratch), None, mode)


def _report_finished(request: BuildRequest, base: StoragePath) -> BuildReport:
    """Report a remote dataset whose builder was killed after it wrote the manifest.

    The manifest is written last, so all that such a process leaves is the build's folder.

    Raises:
        UsageError: there is no such folder: the dataset was not built just now.
    """
    with suppress(PlanVersionError):
        plan = load_plan(base)
        if plan is not None and plan.get_request() == request.to_json():
            remove_build_folder(base)
            path = request.out / MANIFEST
            manifest = Manifest.from_bytes(path.read_bytes(), Path(str(path)))
            return BuildReport(
                sum(s.samples for s in manifest.shards),
                notes=("it was already finished; its temporary files are removed",),
            )
        if plan is None:
            remove_tree(base)  # the process was killed while it removed it
    raise UsageError(
        f"{request.out} already holds a dataset.",
        "it is not overwritten unless asked for.",
        "give --overwrite.",
    )


def _build(
    request: BuildRequest,
    base: StoragePath,
    scratch: Path,
    descriptor: int | None,
    mode: BuildMode,
) -> BuildReport:
    plan = open_plan(request, base, descriptor, mode)
    job = BuildJob(plan, base, scratch, request.inputs, request.options)
    counts = BuildCounts(plan.total, plan.settings.max_failures)
    try:
        with progress(plan.total, f"Building {plan.settings.name}", unit="samples") as bar:
            build_shard_tasks(job, workers=mode.workers, task=mode.task, bar=bar, counts=counts)
        with hold_lease(base, "finish"):
            return _finish(request, job, counts, mode)
    except NoSamplesLeftError:
        remove_tree(base / DONE)  # nothing could be resumed
        raise
    except TooManyFailuresError as error:
        data = format_quarantine(error.bad)
        if isinstance(request.out, Path):
            write_file(get_failed_quarantine_path(Path(os.path.abspath(request.out))), data)
        else:
            write_file(request.out / QUARANTINE, data)
        remove_tree(base / DONE)
        raise


def _finish(
    request: BuildRequest, job: BuildJob, counts: BuildCounts, mode: BuildMode
) -> BuildReport:
    """Put the dataset together, if all tasks are done and no other process has done so."""
    base = job.base
    if not (base / PLAN).exists():
        return BuildReport(0, notes=("finished by another process",))
    built = read_all_records(job)
    if built is None:
        note = (
            "this process's share is done; the dataset is put together by the process that ends "
            "last (or by the next call)"
        )
        return BuildReport(counts.written, tuple(counts.bad), (note,), counts.failures)
    final = base / DATASET if isinstance(base, Path) else request.out
    done = finish_dataset(job, built, final, workers=mode.workers)
    _write_energon(request, final, done.manifest, job.scratch)
    write_file(final / MANIFEST, done.manifest.to_file())  # last: it completes the dataset
    if isinstance(final, Path):
        for leftover in final.rglob(f"*{STAGED}"):  # of a process that was killed while it wrote
            leftover.unlink()
        write_file(base / RENAMING, b"")
        replace_output(final, Path(os.path.abspath(str(request.out))))
    remove_build_folder(base)
    return BuildReport(done.samples, done.quarantined, done.notes, done.failures)


def _write_energon(
    request: BuildRequest, final: StoragePath, manifest: Manifest, scratch: Path
) -> None:
    """Write Megatron-Energon's files, or remove those that an earlier process was asked for."""
    if request.settings.energon:
        write_energon(final, manifest, scratch)
        return
    remove_tree(final / META)
    for shard in manifest.shards:
        (final / f"{shard.path}.idx").unlink(missing_ok=True)
