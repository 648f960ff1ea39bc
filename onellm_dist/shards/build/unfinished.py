"""The folder of an unfinished build: decide whether it is continued, and open or make its plan.

For an output `out` on a disk it is `.out.building/`; in a remote store, `out/.building/`:

    plan.json, input_splits.jsonl   which raw samples go to which shard (plan.py)
    leases/                         locks of the tasks that are being built (workers.py)
    built/, done/                   finished shards, and a record of each task (task.py)
    dataset/                        the dataset, put together at the end (finish.py) and then
                                    renamed to `out`
    renaming                        a mark: the dataset is complete and is being renamed
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.build.make_plan import make_plan
from onellm_dist.shards.build.plan import PLAN, BuildPlan, PlanVersionError, load_plan, save_plan
from onellm_dist.shards.build.request import BuildMode, BuildRequest
from onellm_dist.shards.build.staging import empty_folder, try_lock
from onellm_dist.shards.build.task import BUILT, DONE
from onellm_dist.shards.build.workers import LEASES, Lease, acquire_lease
from onellm_dist.shards.format.dataset import MANIFEST
from onellm_dist.shards.storage.paths import StoragePath, remove_tree

DATASET = "dataset"
SCRATCH = "scratch"
RENAMING = "renaming"
_PLANNING = "plan"
"""Name of the lease under which a plan is made."""


class FinishedByOthersError(Exception):
    """Other processes finished the build after this process began."""


def identify_manifest(manifest: StoragePath) -> object:
    """Return a value that changes when a manifest is replaced by another; None: none exists."""
    if not isinstance(manifest, Path):
        return manifest.exists() or None
    try:
        found = manifest.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def remove_build_folder(base: StoragePath) -> None:
    """Remove the folder, its plan first: a folder without a plan is not taken for a build."""
    (base / PLAN).unlink(missing_ok=True)
    remove_tree(base)


@contextmanager
def hold_lease(base: StoragePath, name: str) -> Iterator[None]:
    """Hold a lease that processes take one at a time.

    If others finished the build and removed its folder, there is nothing to hold.
    """
    lease: Lease | None = None
    with suppress(FileNotFoundError):
        lease = acquire_lease(base, name, wait_for_it=True)
    try:
        yield
    finally:
        if lease is not None:
            lease.release()


@contextmanager
def remove_if_nothing_done(base: Path, descriptor: int) -> Iterator[None]:
    """After an error, remove a build in which no shard was finished: nothing could be resumed."""
    try:
        yield
    except BaseException:
        finished = base / DONE
        if (
            not (finished.is_dir() and any(finished.glob("*.json")))
            and _is_same_folder(base, descriptor)
            and try_lock(descriptor, shared=False)
        ):
            shutil.rmtree(base, ignore_errors=True)
        raise


def _is_same_folder(base: Path, descriptor: int) -> bool:
    """Check that the locked folder was not removed and made again by others."""
    try:
        return os.path.samestat(os.fstat(descriptor), base.stat())
    except OSError:
        return False


def open_plan(
    request: BuildRequest, base: StoragePath, descriptor: int | None, mode: BuildMode
) -> BuildPlan:
    """Open the plan in the folder, which the first process makes.

    Args:
        request: what is built.
        base: the folder of the unfinished build.
        descriptor: of its lock; None: in a remote store.
        mode: how this process builds.

    Raises:
        UsageError: the folder holds an unfinished build of something else.
        FinishedByOthersError: the folder is empty because others finished the build.
    """
    if isinstance(base, Path):
        (base / LEASES).mkdir(exist_ok=True)
    lease = acquire_lease(base, _PLANNING, wait_for_it=True)
    try:
        plan = _find_plan(request, base, descriptor, mode)
        if plan is None:
            if identify_manifest(request.out / MANIFEST) not in (None, mode.manifest_before):
                raise FinishedByOthersError
            _empty_build_folder(base)
            plan, descriptions = make_plan(
                request.source,
                request.inputs,
                seed=request.seed,
                options=request.options,
                settings=request.settings,
                workers=mode.workers,
            )
            save_plan(base, plan, descriptions)
        if isinstance(base, Path):
            # A build that was given up, or killed at its end, may have lost some of these.
            for folder in (BUILT, DONE, SCRATCH):
                (base / folder).mkdir(exist_ok=True)
        return plan
    finally:
        if lease is not None:
            lease.release()


def _find_plan(
    request: BuildRequest, base: StoragePath, descriptor: int | None, mode: BuildMode
) -> BuildPlan | None:
    """Return the plan of the unfinished build if it can be continued.

    Returns:
        None if there is none, or if it was removed.

    Raises:
        UsageError: it belongs to something else, and may not be removed (others may be working on
            it).
    """
    refused: UsageError | None = None
    try:
        plan = load_plan(base)
        if plan is None:
            return None
        if plan.get_request() != request.to_json():
            refused = _make_other_build_error(plan, request)
    except PlanVersionError as error:
        plan, refused = None, error
    if refused is not None and not (mode.overwrite and _is_unshared(descriptor)):
        raise refused
    if refused is None and not (_was_renamed(base) and _is_unshared(descriptor)):
        return plan
    (base / PLAN).unlink()
    if descriptor is not None:
        try_lock(descriptor, shared=True)
    return None


def _is_unshared(descriptor: int | None) -> bool:
    """Check that no other process works here; this process then holds the lock exclusively.

    (In a remote store nobody can know.)
    """
    if descriptor is None or try_lock(descriptor, shared=False):
        return True
    try_lock(descriptor, shared=True)  # an attempt that fails may lose the lock that was held
    return False


def _was_renamed(base: StoragePath) -> bool:
    """Check whether the dataset was renamed to its output, but its build folder not yet removed."""
    return isinstance(base, Path) and (base / RENAMING).exists() and not (base / DATASET).exists()


def _empty_build_folder(base: StoragePath) -> None:
    """Remove what a build of another plan, or one that was killed while it planned, left."""
    if not isinstance(base, Path):
        remove_tree(base)
        return
    for entry in base.iterdir():
        if entry.is_dir() and entry.name != LEASES:
            empty_folder(entry)
            entry.rmdir()
        elif not entry.is_dir():
            entry.unlink()


def _make_other_build_error(plan: BuildPlan, request: BuildRequest) -> UsageError:
    old, new = plan.get_request(), request.to_json()
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    differences = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in keys)
    return UsageError(
        f"{request.out}: its unfinished build was requested differently ({differences}).",
        "shards of two different builds do not fit together.",
        "repeat the earlier request to continue it, or give --overwrite (or --restart) to begin "
        "anew.",
    )
