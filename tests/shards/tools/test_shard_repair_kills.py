"""A repair that is killed or refused has changed nothing that the dataset consists of."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from shard_kills import CONTEXT, KilledAt
from shard_worlds import all_bytes, contents, text_dataset
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import as_webdataset
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.format.index import SUFFIX
from onellm_dist.shards.format.manifest import Manifest
from onellm_dist.shards.tools.repair import repair_command, repair_dataset
from onellm_dist.shards.tools.repair_transaction import hold_dataset
from onellm_dist.shards.tools.verify import verify_dataset

SAMPLES = {f"k{i}": {"bin": bytes(range(256)) * (i + 1), "txt": b"text %d" % i} for i in range(6)}
TARS = [f"shards/train-{i:06d}.tar" for i in range(3)]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def damage(root: Path) -> None:
    """Three shards: one with a damaged sample, one without its index, one cut off."""
    dataset = text_dataset(root, SAMPLES, max_samples=2)
    first, _, last = dataset.shards()
    flip(root / TARS[0], dataset.index(first).parts(1)["bin"].offset)
    cut = dataset.index(last).parts(1)["bin"].offset + 100
    (root / TARS[1]).with_name(f"train-000001.tar{SUFFIX}").unlink()
    (root / TARS[2]).write_bytes((root / TARS[2]).read_bytes()[:cut])


def forge(root: Path, **changes: Any) -> None:
    """Change the first shard in the manifest of a dataset, without its checksum."""
    manifest = json.loads((root / "manifest.json").read_text())
    manifest.pop("checksum", None)
    manifest["shards"][0] |= changes
    (root / "manifest.json").write_text(json.dumps(manifest))


def _repair_and_die(root: Path, at: int, counter: Any) -> None:
    sys.addaudithook(KilledAt(root, at, counter))
    repair_dataset(root)


def kill_at(root: Path, at: int) -> int:
    """Repair in a process that is killed at file operation `at`; return how many it did."""
    counter = CONTEXT.Value("i", 0)
    process = CONTEXT.Process(target=_repair_and_die, args=(root, at, counter))
    process.start()
    process.join()
    assert process.exitcode == (0 if counter.value < at else -9)
    return int(counter.value)


@pytest.mark.slow
def test_a_repair_that_is_killed_anywhere_leaves_the_old_dataset_or_the_new_one(
    tmp_path: Path,
) -> None:
    damage(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "done")
    repair_dataset(tmp_path / "done")
    old, new = (contents_of_intact(tmp_path / name) for name in ("set", "done"))
    before = all_bytes(tmp_path / "set")
    manifests = {before["manifest.json"], (tmp_path / "done/manifest.json").read_bytes()}
    at, last = 0, 1
    while at < last:
        at += 1
        root = tmp_path / f"kill{at}"
        shutil.copytree(tmp_path / "set", root)
        done = kill_at(root, at)
        last = max(last, done + (done == at))
        after = all_bytes(root)
        assert after["manifest.json"] in manifests
        committed = after["manifest.json"] != before["manifest.json"]
        if not committed:
            assert {n: after[n] for n in before if n != "repaired.jsonl"} == before, f"at {at}"
        kept = set(after.values())
        assert all(data in kept for name, data in before.items() if name.endswith(".tar")), at
        found = contents_of_intact(root)
        assert found == (new if committed else old) or found | new == new, at
        repair_dataset(root)
        assert verify_dataset(root) == [] and contents(open_dataset(root)) == new, at
        logged = (root / "repaired.jsonl").read_text().splitlines()
        assert len(logged) == len(set(logged)) == 2
        shutil.rmtree(root)
    assert last > 30


def contents_of_intact(root: Path) -> dict[str, dict[str, bytes]]:
    """Key to parts of all samples that can be read now."""
    from onellm_dist.shards.format.dataset import Dataset
    from onellm_dist.shards.format.parts import read_parts

    data = (root / "manifest.json").read_bytes()
    dataset = Dataset(root, Manifest.from_bytes(data, root))
    found = {}
    for shard in dataset.shards():
        try:
            index = dataset.index(shard)
        except OneLLMError:
            continue
        for row in range(index.samples):
            try:
                parts = read_parts(dataset, shard, row)
            except OneLLMError:
                continue
            found[index.key(row)] = {e: p.data for e, p in parts.items()}
    return found


@pytest.mark.parametrize(
    "path",
    [
        "../victim/shards/train-000000.tar",
        "shards/../../victim/shards/train-000000.tar",
        "/x.tar",
        "",
        "shards",
        "shards/x.tar\0",
        "shards/\n.tar",
        ".tar",
        "shards//x.tar",
        "./x.tar",
        None,
        3,
    ],
)
def test_a_manifest_that_names_another_datasets_tars_changes_nothing(
    tmp_path: Path, path: object
) -> None:
    damage(tmp_path / "victim")
    text_dataset(tmp_path / "set", SAMPLES, max_samples=2)
    forge(tmp_path / "set", path=path)
    before = all_bytes(tmp_path)
    for use in (repair_dataset, verify_dataset, open_dataset):
        with pytest.raises(UsageError, match=r"manifest\.json: (shard|a shard)"):
            use(tmp_path / "set")
    assert all_bytes(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "index", "folder"])
def test_a_link_out_of_the_folder_is_refused_and_followed_on_request(
    tmp_path: Path, kind: str
) -> None:
    text_dataset(tmp_path / "victim", SAMPLES, max_samples=2)
    shutil.copytree(tmp_path / "victim", tmp_path / "set")
    name = {"file": TARS[0], "index": f"{TARS[0]}{SUFFIX}", "folder": "shards"}[kind]
    shutil.rmtree(tmp_path / "set/shards") if kind == "folder" else (
        tmp_path / "set" / name
    ).unlink()
    (tmp_path / "set" / name).symlink_to(tmp_path / "victim" / name)
    before = all_bytes(tmp_path)
    for use in (open_dataset, repair_dataset, verify_dataset):
        with pytest.raises(UsageError, match="is a link that leads out of the folder"):
            use(tmp_path / "set")
    assert verify_dataset(tmp_path / "set", follow_links=True) == []
    assert contents(open_dataset(tmp_path / "set", follow_links=True)) == SAMPLES
    with pytest.raises(UsageError, match="repair the dataset in which the file lies") as caught:
        repair_dataset(tmp_path / "set")
    assert "--follow-links" not in str(caught.value)
    assert all_bytes(tmp_path) == before
    (tmp_path / "moved").symlink_to(tmp_path / "victim")  # the dataset's own place may be a link
    assert contents(open_dataset(tmp_path / "moved")) == SAMPLES


@pytest.mark.seconds
def test_pages_and_pipelines_of_a_linked_dataset_are_made_on_request(tmp_path: Path) -> None:
    text_dataset(tmp_path / "victim", SAMPLES, max_samples=2)
    shutil.copytree(tmp_path / "victim", tmp_path / "set")
    (tmp_path / "set" / TARS[0]).unlink()
    (tmp_path / "set" / TARS[0]).symlink_to(tmp_path / "victim" / TARS[0])
    place, out = str(tmp_path / "set"), str(tmp_path / "page.html")
    runner = CliRunner()
    for command in (["stats"], ["preview"], ["preview", "--key", "k1"]):
        arguments = ["shards", command[0], place, "--out", out, *command[1:]]
        refused = runner.invoke(app, arguments)
        assert refused.exit_code != 0 and "leads out of the folder" in str(refused.exception)
        assert runner.invoke(app, [*arguments, "--follow-links"]).exit_code == 0
        assert "text 1" in Path(out).read_text() or command == ["preview"]
        Path(out).unlink()
    with pytest.raises(UsageError, match="leads out of the folder"):
        as_webdataset(place)
    assert [s["__key__"] for s in as_webdataset(place, follow_links=True)] == list(SAMPLES)


def test_a_link_inside_the_folder_is_read(tmp_path: Path) -> None:
    text_dataset(tmp_path / "set", SAMPLES, max_samples=2)
    os.rename(tmp_path / "set" / TARS[0], tmp_path / "set/elsewhere")
    (tmp_path / "set" / TARS[0]).symlink_to("../elsewhere")
    assert contents(open_dataset(tmp_path / "set")) == SAMPLES


def test_nothing_good_left_leaves_every_byte(tmp_path: Path) -> None:
    root = tmp_path / "set"
    dataset = text_dataset(root, {"a": {"txt": b"x"}, "b": {"txt": b"y"}}, max_samples=1)
    for shard in dataset.shards():
        flip(root / shard.path, dataset.index(shard).parts(0)["txt"].offset)
    before = all_bytes(root)
    with pytest.raises(OneLLMError, match=r"no good sample is left(.|\n)*nothing was changed"):
        repair_dataset(root)
    assert all_bytes(root) == before


def test_a_full_disk_while_samples_are_written_leaves_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(tmp_path / "set")
    before = all_bytes(tmp_path / "set")
    calls = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        repair_dataset(tmp_path / "set")
    assert all_bytes(tmp_path / "set") == before


def test_old_bytes_of_two_repairs_stay_and_the_ids_of_samples_too(tmp_path: Path) -> None:
    root = tmp_path / "set"
    dataset = text_dataset(root, SAMPLES)
    first, index = dataset.shards()[0], dataset.index(dataset.shards()[0])
    flip(root / TARS[0], index.parts(0)["bin"].offset)
    old = [(root / TARS[0]).read_bytes()]
    repair_dataset(root)
    dataset = open_dataset(root)
    (shard,) = dataset.shards()
    assert (shard.path, shard.name) == ("shards/train-000000.repaired-1.tar", first.name)
    flip(root / shard.path, dataset.index(shard).parts(0)["bin"].offset)
    old.append((root / shard.path).read_bytes())
    repair_dataset(root)
    dataset = open_dataset(root)
    assert dataset.shards()[0].path == "shards/train-000000.repaired-2.tar"
    assert dataset.shards()[0].name == first.name
    assert list(contents(dataset)) == ["k2", "k3", "k4", "k5"]
    kept = all_bytes(root)
    assert [kept[f"{TARS[0]}.damaged"], kept[f"{shard.path}.damaged"]] == old
    assert verify_dataset(root) == []


def test_two_repairs_at_once_are_refused(tmp_path: Path) -> None:
    damage(tmp_path / "set")
    with hold_dataset(tmp_path / "set"), pytest.raises(UsageError, match="another process"):
        repair_dataset(tmp_path / "set")


def test_a_store_is_not_repaired_in_place() -> None:
    for url in ("s3://lake/set", Path("s3:/lake/set")):
        with pytest.raises(UsageError, match="not repaired in place"):
            repair_command(Path(url))
