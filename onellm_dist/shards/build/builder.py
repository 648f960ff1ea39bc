"""One build from its request to the finished dataset; stopped at any moment, it goes on from there when it is asked for again.

Where `out` is to be, the unfinished build lies in `.out.building/` (in a remote store: `out/.building/`):

    plan.json, groups.jsonl     which raw_samples go to which shard (planning.py)
    claims/                     locks of the units that are being built (crew.py)
    built/, done/               finished shards, and a record of each unit (unit.py)
    dataset/                    the dataset, put together at the end (finish.py); it is renamed to `out` then
    placing                     it is whole, and is being renamed
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import STAGED
from onellm_dist.common.progress import progress
from onellm_dist.shards.build.finish import read_all_records, finish, format_quarantine
from onellm_dist.shards.build.plan import (
    PLAN,
    OtherVersion,
    BuildPlan,
    make_request_json,
    to_json_options,
    load_plan,
    make_plan,
    save_plan,
)
from onellm_dist.shards.build.prepare import prepare
from onellm_dist.shards.build.settings import BuildSettings
from onellm_dist.shards.build.staging import (
    clear,
    get_failed_quarantine_path,
    lock,
    lock_folder,
    replace_output,
    refuse_output,
    get_staging_folder,
)
from onellm_dist.shards.build.task import BUILT, DONE, BuildCounts, BuildJob, NothingLeft, TooManyFailures
from onellm_dist.shards.build.workers import LEASES, Lease, ArrayTask, build_shard_tasks, lease
from onellm_dist.shards.format.dataset import MANIFEST, Manifest
from onellm_dist.shards.format.energon import META, write_energon
from onellm_dist.shards.sources.base import BuildReport, RawSample, Source
from onellm_dist.shards.storage.paths import StoragePath, remove_tree, write

_DATASET, _SCRATCH, _PLANNING, _PLACING = "dataset", "scratch", "plan", "placing"
_LATE = "the other processes had finished already"
_TRIED = 64
"""Candidates that a dry run reads."""


@dataclass(frozen=True)
class BuildRequest:
    """What the user asked for."""

    source: Source
    inputs: StoragePath
    out: StoragePath
    seed: int
    options: Mapping[str, Any]
    settings: BuildSettings

    def to_json(self) -> dict[str, Any]:
        """As `Plan.request`."""
        options = to_json_options(self.options)
        return make_request_json(
            self.source.name,
            str(self.inputs),
            self.seed,
            options,
            self.settings,
            self.settings.denylist_sha256(),
        )


@dataclass(frozen=True)
class _Work:
    """How this process goes about it."""

    workers: int
    overwrite: bool
    restart: bool
    task: ArrayTask
    before: object
    """What stood under the manifest's name when this process began (`_identity`)."""


class _Late(Exception):
    """Others finished the build since this process began."""


def build_planned(
    request: BuildRequest, *, workers: int, overwrite: bool, task: ArrayTask, restart: bool = False
) -> BuildReport:
    """Builds a planned source's dataset, or this process's share of it.

    Args:
        overwrite: replace a dataset that stands at the output, or an unfinished build of something else.
        restart: throw an unfinished build away first, also one of the same; for one process alone (the others would lose their work).

    Raises:
        UsageError: the output is occupied, or holds an unfinished build of something else.
        TooManyFailures: too many samples are bad; nothing stands under the output.
    """
    if restart and _one_of_several(task):
        raise UsageError(
            "--restart is given to one of several processes.",
            "each would throw away what the others have built.",
            "give it to one process, and start the others without it when that one builds.",
        )
    manifest = (
        Path(os.path.abspath(request.out)) if isinstance(request.out, Path) else request.out
    ) / MANIFEST
    if not overwrite and _one_of_several(task) and manifest.exists():
        return BuildReport(0, notes=(_LATE,))
    work = _Work(workers, overwrite, restart, task, _identity(manifest))
    try:
        return (
            _build_local(request, manifest.parent, work)
            if isinstance(manifest, Path)
            else _build_remote(request, work)
        )
    except (FileNotFoundError, _Late):
        if _identity(manifest) in (None, work.before):
            raise
        return BuildReport(
            0, notes=(_LATE,)
        )  # the build's folder went while this process worked in it


def _build_local(request: BuildRequest, out: Path, work: _Work) -> BuildReport:
    refuse_output(out, overwrite=work.overwrite)
    base = get_staging_folder(out)
    with lock_folder(base, out, shared=True) as descriptor, _tidied(base, descriptor):
        if work.restart:
            if not lock(descriptor, shared=False):
                raise UsageError(
                    f"{out} is being built by another process.",
                    "its work would be thrown away.",
                    "wait for it, or end it first.",
                )
            clear(base)
            lock(descriptor, shared=True)
        return _build(request, base, base / _SCRATCH, descriptor, work)


def _build_remote(request: BuildRequest, work: _Work) -> BuildReport:
    base, manifest = request.out / ".building", request.out / MANIFEST
    if work.restart:
        _removed(base)
    if work.before is not None:
        if not work.overwrite:
            return _finished_before(request, base)
        manifest.unlink()
        work = replace(work, before=None)
    with tempfile.TemporaryDirectory(prefix="onellm-") as scratch:
        return _build(request, base, Path(scratch), None, work)


def _finished_before(request: BuildRequest, base: StoragePath) -> BuildReport:
    """The manifest is the last that is written, so all that a process which was killed behind it left is the build's folder.

    Raises:
        UsageError: there is no such folder: the dataset was not built just now.
    """
    with suppress(OtherVersion):
        plan = load_plan(base)
        if plan is not None and plan.request() == request.to_json():
            _removed(base)
            manifest = Manifest.from_bytes(
                (request.out / MANIFEST).read_bytes(), Path(str(request.out / MANIFEST))
            )
            return BuildReport(
                sum(s.samples for s in manifest.shards),
                notes=("it was finished already, but for tidying up",),
            )
        if plan is None:
            remove_tree(base)  # killed while it was removed
    raise UsageError(
        f"{request.out} already holds a dataset.",
        "it is not overwritten unless asked for.",
        "give --overwrite.",
    )


def _removed(base: StoragePath) -> None:
    """Removes the build's folder, its plan first: without that nothing there is taken for a build."""
    (base / PLAN).unlink(missing_ok=True)
    remove_tree(base)


def _build(
    request: BuildRequest, base: StoragePath, scratch: Path, descriptor: int | None, work: _Work
) -> BuildReport:
    plan = _planned(request, base, descriptor, work)
    job = BuildJob(plan, base, scratch, request.inputs, request.options)
    account = BuildCounts(plan.total, plan.settings.max_failures)
    try:
        with progress(plan.total, f"Building {plan.settings.name}", unit="samples") as bar:
            build_shard_tasks(job, workers=work.workers, task=work.task, bar=bar, account=account)
        with _alone(base):
            if not (base / PLAN).exists():
                return BuildReport(0, notes=("finished by another process",))
            built = read_all_records(job)
            if built is None:
                note = "this process's part is done; the dataset is put together by the process that ends last (or by the next call)"
                return BuildReport(account.written, tuple(account.bad), (note,), account.failures)
            final = base / _DATASET if isinstance(base, Path) else request.out
            done = finish(job, built, final, workers=work.workers)
            _energon(request, final, done.manifest, scratch)
            write(final / MANIFEST, done.manifest.to_bytes())  # last: with it the dataset is whole
            if isinstance(final, Path):
                for left in final.rglob(
                    f"*{STAGED}"
                ):  # of a process that was killed while it wrote
                    left.unlink()
                write(base / _PLACING, b"")
                replace_output(final, Path(os.path.abspath(str(request.out))))
            _removed(base)
            return BuildReport(done.samples, done.quarantined, done.notes, done.failures)
    except NothingLeft:
        remove_tree(base / DONE)  # nothing to go on from
        raise
    except TooManyFailures as error:
        data = format_quarantine(error.bad)
        write(
            get_failed_quarantine_path(Path(os.path.abspath(request.out)))
            if isinstance(request.out, Path)
            else request.out / "quarantine.jsonl",
            data,
        )
        remove_tree(base / DONE)
        raise


def _energon(request: BuildRequest, final: StoragePath, manifest: Manifest, scratch: Path) -> None:
    """Megatron-Energon's files, or none of them (an earlier process may have been asked for them)."""
    if request.settings.energon:
        write_energon(final, manifest, scratch)
        return
    remove_tree(final / META)
    for shard in manifest.shards:
        (final / f"{shard.path}.idx").unlink(missing_ok=True)


def _one_of_several(task: ArrayTask) -> bool:
    """Whether this is a process of an array or of one srun. (A late one of them has nothing to do.)"""
    return task.count > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _identity(manifest: StoragePath) -> object:
    """Changes when another manifest is put there; None: there is none."""
    if not isinstance(manifest, Path):
        return manifest.exists() or None
    try:
        found = manifest.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def _alone(base: StoragePath) -> Iterator[None]:
    """One process at a time."""
    held: Lease | None = None
    with suppress(FileNotFoundError):  # somebody finished the build and removed its folder
        held = lease(base, "finish", wait_for_it=True)
    try:
        yield
    finally:
        if held is not None:
            held.release()


@contextmanager
def _tidied(base: Path, descriptor: int) -> Iterator[None]:
    """After an error, a build in which no shard was finished is removed: there is nothing to go on from."""
    try:
        yield
    except BaseException:
        finished = base / DONE
        if (
            not (finished.is_dir() and any(finished.glob("*.json")))
            and _still_ours(base, descriptor)
            and lock(descriptor, shared=False)
        ):
            shutil.rmtree(base, ignore_errors=True)
        raise


def _still_ours(base: Path, descriptor: int) -> bool:
    """Whether the locked folder is the one of that name, and not one that was removed and made again by others."""
    try:
        return os.path.samestat(os.fstat(descriptor), base.stat())
    except OSError:
        return False


def _planned(request: BuildRequest, base: StoragePath, descriptor: int | None, work: _Work) -> BuildPlan:
    """The plan in `base`, made by the first process that comes.

    Raises:
        UsageError: what lies there is an unfinished build of something else.
        _Late: nothing lies there, because others finished the build.
    """
    if isinstance(base, Path):
        (base / LEASES).mkdir(exist_ok=True)
    held = lease(base, _PLANNING, wait_for_it=True)
    try:
        plan = _plan_there(request, base, descriptor, work)
        if plan is None:
            if _identity(request.out / MANIFEST) not in (None, work.before):
                raise _Late
            _emptied(base)
            plan, groups = make_plan(
                request.source,
                request.inputs,
                seed=request.seed,
                options=request.options,
                settings=request.settings,
                workers=work.workers,
            )
            save_plan(base, plan, groups)
        if isinstance(base, Path):
            for folder in (
                BUILT,
                DONE,
                _SCRATCH,
            ):  # a build that was given up, or whose end was killed, may have lost some
                (base / folder).mkdir(exist_ok=True)
        return plan
    finally:
        if held is not None:
            held.release()


def _plan_there(
    request: BuildRequest, base: StoragePath, descriptor: int | None, work: _Work
) -> BuildPlan | None:
    """The plan of the unfinished build, if it can be gone on with; None: there is none, or it was removed.

    Raises:
        UsageError: it is of something else, and shall not or (while others work on it) may not be removed.
    """
    refused: UsageError | None = None
    try:
        plan = load_plan(base)
        if plan is None:
            return None
        if plan.request() != request.to_json():
            refused = _other_build(plan, request)
    except OtherVersion as error:
        plan, refused = None, error
    if refused is not None and not (work.overwrite and _unshared(descriptor)):
        raise refused
    if refused is None and not (_in_place_already(base) and _unshared(descriptor)):
        return plan
    (base / PLAN).unlink()
    if descriptor is not None:
        lock(descriptor, shared=True)
    return None


def _unshared(descriptor: int | None) -> bool:
    """Whether nobody else works here; this process has the lock alone then. (In a remote store nobody can tell.)"""
    if descriptor is None or lock(descriptor, shared=False):
        return True
    lock(descriptor, shared=True)  # an attempt that fails may lose the lock that was held
    return False


def _in_place_already(base: StoragePath) -> bool:
    """The dataset was put in place, and the process killed before it removed this folder; or it is just about to."""
    return isinstance(base, Path) and (base / _PLACING).exists() and not (base / _DATASET).exists()


def _emptied(base: StoragePath) -> None:
    """Removes what a build of another plan, or one that was killed while it planned, left."""
    if not isinstance(base, Path):
        remove_tree(base)
        return
    for entry in base.iterdir():
        if entry.is_dir() and entry.name != LEASES:
            clear(entry)
            entry.rmdir()
        elif not entry.is_dir():
            entry.unlink()


def _other_build(plan: BuildPlan, request: BuildRequest) -> UsageError:
    old, new = plan.request(), request.to_json()
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    differences = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in keys)
    return UsageError(
        f"{request.out}: an unfinished build of it was asked for otherwise ({differences}).",
        "shards of two different builds do not fit together.",
        "ask for the same to go on with it, or give --overwrite (or --restart) to begin anew.",
    )


def dry_run(request: BuildRequest, *, workers: int) -> str:
    """What a build would do, from the plan and the first raw_samples of some units; nothing is written."""
    plan, groups = make_plan(
        request.source,
        request.inputs,
        seed=request.seed,
        options=request.options,
        settings=request.settings,
        workers=workers,
    )
    with tempfile.TemporaryDirectory(prefix="onellm-") as folder:
        save_plan(Path(folder), plan, groups)
        job = BuildJob(plan, Path(folder), Path(folder), request.inputs, request.options)
        chosen = plan.units[:: max(1, len(plan.units) // 8)][:8]
        tried: list[RawSample] = [
            c for u in chosen for c in islice(job.raw_samples(u), _TRIED // len(chosen))
        ]
        outcomes = [prepare(c, plan.modalities, plan.settings) for c in tried]
    kept = [o for o in outcomes if o.parts is not None]
    size = sum(len(d) for o in kept for d in (o.parts or {}).values())
    splits = Counter[str]()
    for unit in plan.units:
        splits[unit.split] += 1
    lines = [
        f"{request.inputs}: {len(plan.groups)} groups, {plan.total} raw_samples of {', '.join(plan.modalities) or 'text'}",
        f"{request.out}: {len(plan.units)} shards or more ({', '.join(f'{s}: {n}' for s, n in splits.items())})",
        f"tried {len(tried)}: {len(kept)} good, about {size / max(1, len(tried)) * plan.total / 1e9:.3g} GB in all",
        *(f"  {o.where}: {o.reason}" for o in outcomes if o.parts is None),
        *plan.notes,
        "nothing was written",
    ]
    return "\n".join(lines)
