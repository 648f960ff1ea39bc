"""One build from its request to the finished dataset; stopped at any moment, it goes on from there when it is asked for again.

Where `out` is to be, the unfinished build lies in `.out.building/` (in a remote store: `out/.building/`):

    plan.json, groups.jsonl     which candidates go to which shard (planning.py)
    claims/                     locks of the units that are being built (crew.py)
    built/, done/               finished shards, and a record of each unit (unit.py)
    dataset/                    the dataset, put together at the end (finish.py); it is renamed to `out` then
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from onellm_dist.errors import UsageError
from onellm_dist.progress import progress
from onellm_dist.shards.crew import CLAIMS, Claim, Task, build_units, claim
from onellm_dist.shards.energon import write_energon
from onellm_dist.shards.files import ASIDE
from onellm_dist.shards.finish import all_records, finish, quarantine_bytes
from onellm_dist.shards.format import MANIFEST
from onellm_dist.shards.places import Place, remove_tree, write
from onellm_dist.shards.planning import Plan, json_options, load_plan, make_plan, save_plan
from onellm_dist.shards.prepare import prepare
from onellm_dist.shards.settings import Settings
from onellm_dist.shards.sources.base import BuildReport, Candidate, Source
from onellm_dist.shards.staging import clear, failed_quarantine, lock, locked, put_in_place, refuse_output, staging_of
from onellm_dist.shards.unit import BUILT, DONE, Account, Job, NothingLeft, TooManyFailures

_DATASET, _SCRATCH, _PLANNING = "dataset", "scratch", "plan"
_LATE = "the other processes had finished already"
_TRIED = 64
"""Candidates that a dry run reads."""


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    source: Source
    inputs: Place
    out: Place
    seed: int
    options: Mapping[str, Any]
    settings: Settings

    def to_json(self) -> dict[str, Any]:
        """As `Plan.request`."""
        return {
            "source": self.source.name, "inputs": str(self.inputs), "seed": self.seed, "options": json_options(self.options),
            **self.settings.to_json(),
        }  # fmt: skip


def build_planned(request: Request, *, workers: int, overwrite: bool, task: Task) -> BuildReport:
    """Builds a planned source's dataset, or this process's share of it.

    Raises:
        UsageError: the output is occupied, or holds an unfinished build of something else.
        TooManyFailures: too many samples are bad; nothing stands under the output.
    """
    if isinstance(request.out, Path):
        out = Path(os.path.abspath(request.out))
        try:
            refuse_output(out, overwrite=overwrite)
        except UsageError:
            if not overwrite and _finished_by_others(out / MANIFEST, task):
                return BuildReport(0, notes=(_LATE,))
            raise
        with locked(staging_of(out), out, shared=True) as descriptor, _tidied(staging_of(out), descriptor, out):
            return _build(request, staging_of(out), staging_of(out) / _SCRATCH, descriptor, workers, overwrite, task)
    base = request.out / ".building"
    if not overwrite and _finished_by_others(request.out / MANIFEST, task):
        return BuildReport(0, notes=(_LATE,))
    if (request.out / MANIFEST).exists():
        if not overwrite:
            raise UsageError(f"{request.out} already holds a dataset.", "it is not overwritten unless asked for.", "give --overwrite.")
        (request.out / MANIFEST).unlink()
    with tempfile.TemporaryDirectory(prefix="onellm-") as scratch:
        return _build(request, base, Path(scratch), None, workers, overwrite, task)


def _build(
    request: Request, base: Place, scratch: Path, descriptor: int | None, workers: int, overwrite: bool, task: Task
) -> BuildReport:  # fmt: skip
    plan = _planned(request, base, descriptor, workers, overwrite)
    scratch.mkdir(exist_ok=True)
    job = Job(plan, base, scratch, request.inputs, request.options)
    account = Account(plan.total, plan.settings.max_failures)
    try:
        with progress(plan.total, f"Building {plan.settings.name}", unit="samples") as bar:
            build_units(job, workers=workers, task=task, bar=bar, account=account)
        with _alone(base):
            if not (base / "plan.json").exists():
                return BuildReport(0, notes=("finished by another process",))
            built = all_records(job)
            if built is None:
                note = "this process's part is done; the dataset is put together by the process that ends last (or by the next call)"
                return BuildReport(account.written, tuple(account.bad), (note,), account.failures)
            final = base / _DATASET if isinstance(base, Path) else request.out
            done = finish(job, built, final, workers=workers)
            if plan.settings.energon:
                write_energon(final)
            if isinstance(final, Path):
                for left in final.rglob(f"*{ASIDE}"):  # of a process that was killed while it wrote
                    left.unlink()
                put_in_place(final, Path(os.path.abspath(str(request.out))))
            remove_tree(base)
            return BuildReport(done.samples, done.quarantined, done.notes, done.failures)
    except NothingLeft:
        remove_tree(base / DONE)  # nothing to go on from
        raise
    except TooManyFailures as error:
        data = quarantine_bytes(error.bad)
        write(
            failed_quarantine(Path(os.path.abspath(request.out))) if isinstance(request.out, Path) else request.out / "quarantine.jsonl",
            data,
        )
        remove_tree(base / DONE)
        raise


def _finished_by_others(manifest: Place, task: Task) -> bool:
    """Whether a dataset is there that others of one array or one srun built, so that a late one of them has nothing to do."""
    together = task.count > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return together and manifest.exists()


@contextmanager
def _alone(base: Place) -> Iterator[None]:
    """One process at a time."""
    held: Claim | None = None
    with suppress(FileNotFoundError):  # somebody finished the build and removed its folder
        held = claim(base, "finish", wait_for_it=True)
    try:
        yield
    finally:
        if held is not None:
            held.release()


@contextmanager
def _tidied(base: Path, descriptor: int, out: Path) -> Iterator[None]:
    """After an error, a build in which no shard was finished is removed: there is nothing to go on from."""
    try:
        yield
    except BaseException:
        finished = base / DONE
        if not (finished.is_dir() and any(finished.glob("*.json"))) and lock(descriptor, shared=False):
            shutil.rmtree(base, ignore_errors=True)
        raise


def _planned(request: Request, base: Place, descriptor: int | None, workers: int, overwrite: bool) -> Plan:
    """The plan in `base`, made by the first process that comes.

    Raises:
        UsageError: what lies there is an unfinished build of something else.
    """
    if isinstance(base, Path):
        (base / CLAIMS).mkdir(exist_ok=True)
    held = claim(base, _PLANNING, wait_for_it=True)
    try:
        plan = load_plan(base)
        if plan is not None and plan.request() != request.to_json():
            if not overwrite or (descriptor is not None and not lock(descriptor, shared=False)):
                raise _other_build(plan, request)
            plan = None
            (base / "plan.json").unlink()
            if descriptor is not None:
                lock(descriptor, shared=True)
        if plan is not None:
            return plan
        _emptied(base)
        plan, groups = make_plan(
            request.source, request.inputs, seed=request.seed, options=request.options, settings=request.settings, workers=workers
        )
        save_plan(base, plan, groups)
        return plan
    finally:
        if held is not None:
            held.release()


def _emptied(base: Place) -> None:
    """Removes what a build of another plan, or one that was killed while it planned, left."""
    if not isinstance(base, Path):
        remove_tree(base)
        return
    for entry in base.iterdir():
        if entry.is_dir() and entry.name != CLAIMS:
            clear(entry)
            entry.rmdir()
        elif not entry.is_dir():
            entry.unlink()
    for folder in (BUILT, DONE, _SCRATCH):
        (base / folder).mkdir()


def _other_build(plan: Plan, request: Request) -> UsageError:
    old, new = plan.request(), request.to_json()
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    differences = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in keys)
    return UsageError(
        f"{request.out}: an unfinished build of it was asked for otherwise ({differences}).",
        "shards of two different builds do not fit together.",
        "ask for the same to go on with it, or give --overwrite to begin anew.",
    )


def dry_run(request: Request, *, workers: int) -> str:
    """What a build would do, from the plan and the first candidates of some units; nothing is written."""
    plan, groups = make_plan(
        request.source, request.inputs, seed=request.seed, options=request.options, settings=request.settings, workers=workers
    )
    with tempfile.TemporaryDirectory(prefix="onellm-") as folder:
        save_plan(Path(folder), plan, groups)
        job = Job(plan, Path(folder), Path(folder), request.inputs, request.options)
        chosen = plan.units[:: max(1, len(plan.units) // 8)][:8]
        tried: list[Candidate] = [c for u in chosen for c in islice(job.candidates(u), _TRIED // len(chosen))]
        outcomes = [prepare(c, plan.modalities, plan.settings) for c in tried]
    kept = [o for o in outcomes if o.parts is not None]
    size = sum(len(d) for o in kept for d in (o.parts or {}).values())
    splits = Counter[str]()
    for unit in plan.units:
        splits[unit.split] += 1
    lines = [
        f"{request.inputs}: {len(plan.groups)} groups, {plan.total} candidates of {', '.join(plan.modalities) or 'text'}",
        f"{request.out}: {len(plan.units)} shards or more ({', '.join(f'{s}: {n}' for s, n in splits.items())})",
        f"tried {len(tried)}: {len(kept)} good, about {size / max(1, len(tried)) * plan.total / 1e9:.3g} GB in all",
        *(f"  {o.where}: {o.reason}" for o in outcomes if o.parts is None),
        *plan.notes,
        "nothing was written",
    ]
    return "\n".join(lines)
