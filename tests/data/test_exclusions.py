"""Lists of samples that are left out: what they name, and that nothing else moves."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from data_worlds import open_plan, write

from onellm_dist.common.errors import UsageError
from onellm_dist.data.exclusion_check import find_unused_entries
from onellm_dist.data.exclusions import Exclusions, add_entries, read_entries, read_exclusions
from onellm_dist.data.reader import Reader


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exclusions")
    write(root, "imu", ["imu"], 14)
    write(root, "talk", [], 14)
    return root


def read_all(root: Path, exclusions: Exclusions, world_size: int) -> dict[str, tuple[float, int]]:
    """Sample id -> (weight, text tokens) of three steps (three epochs and a half)."""
    plan = open_plan(root, {"imu": 1, "talk": 1}, global_batch=28)
    plan.corpus.exclusions = exclusions
    reader = Reader(plan.corpus)
    found = {}
    for step in range(3):
        for rank in plan.step(step, world_size).ranks:
            for micro in rank:
                batch = reader.read(micro)
                for i, name in enumerate(batch.sample_ids):
                    found[name] = float(batch.weights[i]), batch.text_token_counts[i]
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_exactly_what_is_listed_has_no_weight_and_everything_keeps_its_place(
    root: Path, world_size: int
) -> None:
    before = read_all(root, Exclusions(), 1)
    sample, use, shard = (
        "imu/train-000000/imu-0003",
        "talk/train-000001/talk-0009@1",
        "imu/train-000001",
    )
    exclusions = Exclusions(dict.fromkeys((sample, use, shard, "other/train-000000/x"), "LIST"))
    after = read_all(root, exclusions, world_size)
    assert {name: tokens for name, (_, tokens) in after.items()} == {
        name: tokens for name, (_, tokens) in before.items()
    }
    left_out = {name for name, (weight, _) in after.items() if weight == 0}
    assert left_out == {
        name for name in before if name.startswith((f"{sample}@", f"{shard}/")) or name == use
    }
    assert f"{sample}@0" in left_out and f"{sample}@1" in left_out


def test_entries_that_leave_nothing_out_are_found_with_similar_names(root: Path) -> None:
    train = open_plan(root, {"imu": 1}).corpus
    other = open_plan(root, {"talk": 1}).corpus
    used = ["imu/train-000000/imu-0003", "imu/train-000000/imu-0003@7", "talk/train-000001"]
    similar = {
        "imu/train-000000/imu-0003@x": "imu/train-000000/imu-0003",
        "imu/train-00000/imu-0003": "imu/train-00000",
        "talk/train-00009": "talk/train-00000",
    }
    nothing = ["imu/train-000000/of no such name", "imu/of no such name"]
    elsewhere = ["imo/train-000000/imu-0003", "train-000001/imu-0009", "laion/a/b", "laion/a/c"]
    entries = [*used, *similar, *nothing, *elsewhere]
    found = find_unused_entries(entries, [(c.datasets, c.shards) for c in (train, other)])
    assert found.other_datasets == {"imo": 1, "train-000001": 1, "laion": 2}
    assert found.unmatched == [*similar, *nothing]
    text = found.describe()
    for name, near in {"imo": "imu", "train-000001": "imu/train-000001"}.items():
        assert f"{name} (did you mean {near}?)" in text
    for entry, near in similar.items():
        assert f"{entry} (did you mean {near}" in text
    assert "4 of them name datasets that this run does not read" in text
    assert "5 of them name no sample and no shard" in text
    assert not found.similar.keys() & {*nothing, "laion"}
    only_train = find_unused_entries(used, [(train.datasets, train.shards)])
    assert only_train.other_datasets == {"talk": 1} and not only_train.unmatched
    assert find_unused_entries(used[:2], [(train.datasets, train.shards)]).describe() == ""


def test_a_list_is_text_with_comments_and_any_key(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("# why\r\n\na/b/c d\u2028e\r\na/b\na/b/x@y@3\na/b/\n", encoding="utf-8")
    assert read_entries(path) == ["a/b/c d\u2028e", "a/b", "a/b/x@y@3", "a/b"]
    path.write_text("\ufeffa/b/c\n", encoding="utf-8")
    assert read_entries(path) == ["a/b/c"]
    path.write_text("a/b\n", encoding="utf-8")
    other = tmp_path / "other"
    assert add_entries(other, ["d/s/k", "a/b", "d/s/k"]) == ["d/s/k", "a/b"]
    assert add_entries(other, ["a/b", "d/s/l"]) == ["d/s/l"]
    assert read_entries(other) == ["d/s/k", "a/b", "d/s/l"]
    both = read_exclusions(path, other)
    assert both.entries["a/b"] == str(path) and both.entries["d/s/k"] == str(other)
    assert both.find("a/b/anything@0") == f"excluded by {path}"
    assert both.find("a/bc/anything@0") is None


@pytest.mark.parametrize("text", ["sample\n", "a/b/c\n/x\n", "/\n", b"\xff\xfe"])
def test_a_list_that_names_nothing_is_refused(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "list"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=rf"^data\.exclude={re.escape(str(path))}: "):
        read_exclusions(path)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(path))}: "):  # not a key of the recipe
        read_exclusions(None, path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_exclusions(tmp_path / "missing")


def test_processes_that_add_at_once_lose_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("# kept\na/b/first", encoding="utf-8")  # without an end of line
    lists = [[f"d/s/{writer}-{n}" for n in range(25)] for writer in range(4)]
    children = []
    for entries in lists:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for entry in entries:
                    add_entries(path, [entry, "d/s/shared"])
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    found = read_entries(path)
    assert sorted(found) == sorted(
        ["a/b/first", "d/s/shared", *(e for entries in lists for e in entries)]
    )
    assert path.read_text(encoding="utf-8").startswith("# kept\na/b/first\n")


def test_a_full_disk_leaves_the_list_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list"
    path.write_text("a/b/first\n", encoding="utf-8")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match="No space left"):
        add_entries(path, ["a/b/second"])
    assert path.read_text(encoding="utf-8") == "a/b/first\n"
