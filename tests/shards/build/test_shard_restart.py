"""Unfinished builds: begun anew, left behind, or finished by others while a process still works."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import fsspec
import pytest
from shard_rows import ROWS, build, register_rows, write_rows
from shard_worlds import all_bytes, write_tree

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.build import builder, task, unfinished, workers
from onellm_dist.shards.build import plan as plan_module
from onellm_dist.shards.build.request import BuildMode, BuildRequest
from onellm_dist.shards.build.staging import lock_folder, try_lock
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.format import energon
from onellm_dist.shards.storage.paths import RemotePath


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    register_rows(monkeypatch)


class Killed(BaseException):
    """Stands for a SIGKILL: the code after it does not run."""


def stop_at(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *, after: bool = False
) -> None:
    """The process dies at (or after) the next call of a function."""
    original = getattr(module, name)

    def dying(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(module, name, original)
        if after:
            original(*arguments, **options)
        raise Killed

    monkeypatch.setattr(module, name, dying)


# -- begun anew


@pytest.mark.seconds
def test_restart_begins_the_same_anew_and_overwrite_resumes(tmp_path: Path) -> None:
    inputs, folder = write_rows(tmp_path / "in"), tmp_path / ".out.building"
    build(inputs, tmp_path / "out", task=ArrayTask(0, 2))
    write_tree(
        tmp_path / "in", {"rows.txt": (inputs / "rows.txt").read_text().replace("caption", "title")}
    )
    build(
        inputs, tmp_path / "out", task=ArrayTask(1, 4), overwrite=True
    )  # processes called alike share one build
    assert len(list(folder.glob("done/*.json"))) == 6
    build(inputs, tmp_path / "new")
    build(inputs, tmp_path / "out", restart=True)
    assert all_bytes(tmp_path / "out") == all_bytes(
        tmp_path / "new"
    )  # nothing of the old input is in it
    assert not folder.exists()


def test_restart_is_for_one_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, folder = write_rows(tmp_path / "in"), tmp_path / ".out.building"
    build(inputs, tmp_path / "out", task=ArrayTask(0, 2))
    with pytest.raises(UsageError, match="--restart is given to one of several"):
        build(inputs, tmp_path / "out", restart=True, task=ArrayTask(0, 2))
    with (
        lock_folder(folder, tmp_path / "out", shared=True),
        pytest.raises(UsageError, match="is being built by another process"),
    ):
        build(inputs, tmp_path / "out", restart=True)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    with pytest.raises(UsageError, match="--restart is given to one of several"):
        build(inputs, tmp_path / "out", restart=True)
    assert len(list(folder.glob("done/*.json"))) == 4


def test_a_plan_of_another_version_is_replaced_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_rows(tmp_path / "in")
    made = plan_module.VERSION - 1
    monkeypatch.setattr(plan_module, "VERSION", made)
    build(inputs, tmp_path / "out", task=ArrayTask(0, 2))
    monkeypatch.undo()
    register_rows(monkeypatch)
    with pytest.raises(UsageError, match=rf"plan of version {made}.*\n.*\n.*--overwrite"):
        build(inputs, tmp_path / "out")
    with (
        lock_folder(tmp_path / ".out.building", tmp_path / "out", shared=True),
        pytest.raises(UsageError, match=f"plan of version {made}"),
    ):
        build(inputs, tmp_path / "out", overwrite=True)  # another process works on it
    assert build(inputs, tmp_path / "out", overwrite=True).samples == 56


def test_a_changed_denylist_is_another_build(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "in")
    (tmp_path / "deny").write_text("http://caption number 4\n")
    build(inputs, tmp_path / "out", denylist=tmp_path / "deny", task=ArrayTask(0, 2))
    (tmp_path / "deny").write_text("http://caption number 4\nhttp://caption number 5\n")
    with pytest.raises(UsageError, match=r"requested differently \(denylist_sha256: "):
        build(inputs, tmp_path / "out", denylist=tmp_path / "deny")


@pytest.mark.parametrize("name", ["a b", "a/b", ".a", "-a", "a\n"])
def test_names_that_no_dataset_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="characters other than letters"):
        build(write_rows(tmp_path / "in"), tmp_path / "out", name=name)


# -- left behind


def test_a_build_killed_after_the_last_rename_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_rows(tmp_path / "in")
    stop_at(monkeypatch, builder, "remove_build_folder")
    with pytest.raises(Killed):
        build(inputs, tmp_path / "out")
    complete = all_bytes(tmp_path / "out")
    assert (tmp_path / ".out.building/plan.json").exists()
    build(inputs, tmp_path / "out", overwrite=True)
    assert all_bytes(tmp_path / "out") == complete
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_process_between_the_last_rename_and_the_removal_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, folder = write_rows(tmp_path / "in"), tmp_path / ".out.building"
    stop_at(monkeypatch, builder, "remove_build_folder")
    with pytest.raises(Killed):
        build(inputs, tmp_path / "out")
    mode = BuildMode(1, True, False, ArrayTask(), None)
    plan = plan_module.load_plan(folder)
    assert plan is not None
    request = BuildRequest(ROWS, inputs, tmp_path / "out", plan.seed, plan.options, plan.settings)
    with (
        lock_folder(folder, tmp_path / "out", shared=True),
        lock_folder(folder, tmp_path / "out", shared=True) as descriptor,
    ):
        assert (
            unfinished._find_plan(request, folder, descriptor, mode) is not None
        )  # the other process is about to remove it
    with lock_folder(folder, tmp_path / "out", shared=True) as descriptor:
        assert unfinished._find_plan(request, folder, descriptor, mode) is None
        assert try_lock(descriptor, shared=True)
    assert not (folder / "plan.json").exists()


@pytest.mark.parametrize("lost", ["done", "built", "scratch"])
@pytest.mark.seconds
def test_a_plan_without_its_folders_is_resumed(tmp_path: Path, lost: str) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "alone")
    build(inputs, tmp_path / "out", task=ArrayTask(0, 2))
    shutil.rmtree(tmp_path / ".out.building/done")
    shutil.rmtree(tmp_path / f".out.building/{lost}", ignore_errors=True)
    build(inputs, tmp_path / "out")
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "alone")


@pytest.mark.parametrize("place", ["before-manifest", "before-removal", "during-removal"])
@pytest.mark.seconds
def test_a_remote_build_that_dies_at_its_end_is_complete_when_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "alone")
    store, out = fsspec.filesystem("memory"), f"memory://end-{place}/out"
    if place == "before-manifest":
        stop_at(monkeypatch, builder, "_write_energon", after=True)
    elif place == "before-removal":
        stop_at(monkeypatch, builder, "remove_build_folder")
    else:
        stop_at(monkeypatch, RemotePath, "unlink", after=True)
    try:
        with pytest.raises(Killed):
            build(inputs, out)  # type: ignore[arg-type]
        assert store.exists(f"{out}/manifest.json") == (place != "before-manifest")
        if place != "during-removal":  # without its plan the rest is not a build
            assert build(inputs, out).samples == 56  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="already holds a dataset"):
            build(inputs, out)  # type: ignore[arg-type]
        found = {k.split("/out/", 1)[1]: store.cat(k) for k in store.find(f"/end-{place}/out")}
        assert found == all_bytes(tmp_path / "alone")
    finally:
        store.rm(f"/end-{place}", recursive=True)


# -- finished by others


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["lease", "store"])
@pytest.mark.seconds
def test_a_process_that_works_when_others_finish_is_late_and_not_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, overwrite: bool
) -> None:
    inputs = write_rows(tmp_path / "in")
    if overwrite:
        build(inputs, tmp_path / "out")
    module, name = (workers, "acquire_lease") if where == "lease" else (task, "store_file")
    original = getattr(module, name)

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, name, original)
        os.replace(
            tmp_path / ".out.building", tmp_path / "taken"
        )  # this process's lock goes with it
        build(inputs, tmp_path / "out", overwrite=overwrite)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, meanwhile)
    assert build(inputs, tmp_path / "out", overwrite=overwrite).notes == (
        "the other processes had already finished",
    )
    assert not (tmp_path / ".out.building").exists()


def test_a_missing_file_is_not_mistaken_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "out")

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError(2, "No such file", "caption.txt")

    monkeypatch.setattr(unfinished, "make_plan", missing)
    with pytest.raises(OneLLMError, match=r"caption\.txt: No such file"):
        build(inputs, tmp_path / "out", overwrite=True)


# -- Energon's database


def test_a_full_disk_under_energons_database_loses_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, seen = write_rows(tmp_path / "in"), list[Path]()
    build(inputs, tmp_path / "alone", energon=False)

    def full(root: Any, shards: Any, scratch: Path) -> None:
        seen.append(scratch)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(energon, "_write_database", full)
    with pytest.raises(OneLLMError, match=r"database or disk is full(.|\n)*-o energon=false"):
        build(inputs, tmp_path / "out")
    assert seen[0].is_relative_to(tmp_path / ".out.building")  # not in $TMPDIR
    assert len(list((tmp_path / ".out.building/done").glob("*.json"))) == 8
    build(inputs, tmp_path / "out", energon=False)  # this is the same build
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "alone")
    assert not (tmp_path / "out/.nv-meta").exists()
    with pytest.raises(OneLLMError, match="disk is full"):
        energon.write_energon(tmp_path / "out")
    assert seen[1].is_relative_to(tmp_path / "out/.nv-meta")
    assert os.listdir(tmp_path / "out/.nv-meta") == []


def test_indexes_are_sorted_where_the_database_is_made(tmp_path: Path) -> None:
    database = sqlite3.connect(":memory:")
    with (
        pytest.raises(sqlite3.OperationalError, match="not a writable directory"),
        energon._sort_in(tmp_path / "none", database),
    ):
        pass
    with energon._sort_in(tmp_path, database):
        assert database.execute("PRAGMA temp_store_directory").fetchone() == (str(tmp_path),)
    assert database.execute("PRAGMA temp_store_directory").fetchone() in (None, ("",))
