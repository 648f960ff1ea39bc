"""Checkpoints on the disk: written, hashed, verified, kept, replaced."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_folders import checkpoint, config
from one_rank import ONE_RANK
from safetensors.torch import load_file

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import replace_folder, restore_folder, sha256_file
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.train.callbacks.best_model import BestModel
from onellm_dist.train.checkpoint.files import (
    BLOCK_BYTES,
    AbandonedError,
    FileRecord,
    find_damage,
    write_tensors,
)
from onellm_dist.train.checkpoint.folder import (
    get_file_records,
    list_checkpoints,
    make_checkpoint_name,
    parse_name,
    prune,
    read_manifest,
    recover_checkpoints,
)
from onellm_dist.train.checkpoint.resume import find_checkpoint
from onellm_dist.train.recovery import find_good_checkpoint


def test_files_are_safetensors_and_hashed_on_their_way(tmp_path: Path) -> None:
    tensors = {
        "a:0:master": torch.randn(BLOCK_BYTES // 4 + 7),
        "b:3:exp_avg": torch.arange(5.0),
        "none:0:master": torch.zeros(0),
    }
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, tensors)
    assert (
        written == FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        and sha256_file(path) == written.sha256
    )
    back = load_file(path)
    assert back.keys() == tensors.keys() and all(
        torch.equal(back[name], tensors[name]) for name in tensors
    )
    write_tensors(path, {})
    assert load_file(path) == {}


def test_a_write_can_be_given_up_and_takes_fp32_alone(tmp_path: Path) -> None:
    abandon = threading.Event()
    abandon.set()
    with pytest.raises(AbandonedError):
        write_tensors(tmp_path / "x", {"a": torch.zeros(3)}, abandon)
    with pytest.raises(ValueError, match="bfloat16"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(3, dtype=torch.bfloat16)})


def test_what_is_wrong_with_files_is_said(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"abc")
    good = FileRecord(3, hashlib.sha256(b"abc").hexdigest())
    assert find_damage([(tmp_path / "good", good)], ONE_RANK) == []
    (tmp_path / "flipped").write_bytes(b"abd")
    (tmp_path / "short").write_bytes(b"ab")
    found = find_damage(
        [(tmp_path / name, good) for name in ("flipped", "short", "gone")], ONE_RANK
    )
    assert [problem.split()[0].rstrip(":") for problem in found] == ["flipped", "gone", "short"]
    assert "sha256" in found[0] and "2 of 3 bytes" in found[2]


def test_the_newest_with_right_checksums_is_resumed_and_the_others_are_events_written(
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoints"
    checkpoint(root / make_checkpoint_name(9))
    checkpoint(root / make_checkpoint_name(10), said=b"abd")
    checkpoint(root / make_checkpoint_name(11), said=b"abcd")
    (root / make_checkpoint_name(12)).mkdir()
    (root / f".{make_checkpoint_name(13)}.partial").mkdir()
    found = find_checkpoint(config(tmp_path), root, ONE_RANK)
    assert found.folder == root / make_checkpoint_name(9)
    assert [name for name, _ in found.damaged] == [
        make_checkpoint_name(12),
        make_checkpoint_name(11),
        make_checkpoint_name(10),
    ]
    assert "sha256" in found.damaged[2][1]
    assert list(root.glob(".*.partial")), "a start that may still be refused removes nothing"
    assert find_checkpoint(config(tmp_path, resume="never"), root, ONE_RANK).folder is None
    with pytest.raises(UsageError, match="sha256"):
        find_checkpoint(
            config(tmp_path, resume=str(root / make_checkpoint_name(10))), root, ONE_RANK
        )


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert find_checkpoint(config(tmp_path), root, ONE_RANK).folder is None
    checkpoint(root / make_checkpoint_name(9), said=b"abd")
    with pytest.raises(OneLLMError, match="every checkpoint"):
        find_checkpoint(config(tmp_path), root, ONE_RANK)


def test_checkpoints_of_version_1_are_read_and_later_ones_are_not(tmp_path: Path) -> None:
    old = checkpoint(tmp_path / "checkpoints" / make_checkpoint_name(3), version=1)
    manifest = read_manifest(old)
    assert manifest is not None and get_file_records(old, manifest) == []
    assert find_checkpoint(config(tmp_path), old.parent, ONE_RANK).folder == old
    assert read_manifest(checkpoint(tmp_path / "later", version=3)) is None


def test_some_stay_for_ever(tmp_path: Path) -> None:
    for step in (0, 10, 20, 25, 30, 35, 100000000):
        checkpoint(tmp_path / make_checkpoint_name(step))
    prune(tmp_path, 2, keep_every=20)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        make_checkpoint_name(20),
        make_checkpoint_name(35),
        "step-100000000",
    ]


def test_one_stays_for_every_so_many_hours(tmp_path: Path) -> None:
    """Written 40 minutes apart and pruned after each: one of every two hours stays for good."""
    for number in range(12):
        checkpoint(tmp_path / make_checkpoint_name(10 * number), written=1e9 + 2400 * number)
        prune(tmp_path, 2, keep_every_hours=2)
    kept = [10, 40, 70, 100]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        make_checkpoint_name(step) for step in (*kept, 110)
    ]
    prune(tmp_path, 1, keep_every=20)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        make_checkpoint_name(step) for step in (40, 100, 110)
    ], "no hours asked for"


def test_one_that_does_not_say_when_it_was_written_is_as_old_as_its_manifest(
    tmp_path: Path,
) -> None:
    for number in range(6):
        folder = checkpoint(tmp_path / make_checkpoint_name(1 + number))
        os.utime(folder / CHECKPOINT_MANIFEST, times=(1e9 + 1800 * number,) * 2)
    prune(tmp_path, 1, keep_every_hours=1)
    assert [parse_name(folder) for folder in list_checkpoints(tmp_path)] == [1, 3, 5, 6]


def test_what_is_cut_short_does_not_count_among_those_that_stay(tmp_path: Path) -> None:
    for step in (300, 350, 400):
        checkpoint(tmp_path / make_checkpoint_name(step), said=b"abcd" if step == 400 else None)
    prune(tmp_path, 1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        make_checkpoint_name(350),
        make_checkpoint_name(400),
    ]
    checkpoint(tmp_path / make_checkpoint_name(450))
    prune(tmp_path, 1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [make_checkpoint_name(450)]
    (tmp_path / make_checkpoint_name(450) / CHECKPOINT_MANIFEST).unlink()
    prune(tmp_path, 1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [make_checkpoint_name(450)]


def test_a_rollback_passes_over_what_is_damaged_and_moves_it_aside(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    good = checkpoint(root / make_checkpoint_name(9))
    checkpoint(root / make_checkpoint_name(10), said=b"abd")
    written: list[dict[str, Any]] = []
    events: Any = SimpleNamespace(
        write=lambda event, **fields: written.append({"event": event, **fields})
    )
    assert find_good_checkpoint(tmp_path, ONE_RANK, events) == good
    assert [(line["event"], line["folder"]) for line in written] == [
        ("checkpoint_damaged", make_checkpoint_name(10))
    ]
    assert (
        list_checkpoints(root) == [good]
        and len(list(tmp_path.glob(f"before-*/{make_checkpoint_name(10)}"))) == 1
    )
    (good / "rank-00000.safetensors").write_bytes(b"abd")
    with pytest.raises(OneLLMError, match="no complete checkpoint"):
        find_good_checkpoint(tmp_path, ONE_RANK, events)


def killed_after(renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed when it comes to its next rename after this many."""
    rename = Path.rename
    done: list[Path] = []

    def counted(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)


@pytest.mark.parametrize("cut", ["before", "between", "after"])
def test_a_checkpoint_that_replaces_one_is_never_neither(
    tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, between or after the two renames: the old one or the new one is there."""
    folder, partial = (
        checkpoint(tmp_path / make_checkpoint_name(4), data=b"old"),
        checkpoint(tmp_path / f".{make_checkpoint_name(4)}.partial", data=b"new"),
    )
    renames = {"before": 0, "between": 1, "after": 2}[cut]
    killed_after(renames, monkeypatch)
    try:
        replace_folder(partial, folder)
    except KeyboardInterrupt:
        assert cut != "after"
    monkeypatch.undo()
    recover_checkpoints(tmp_path)
    assert (folder / "rank-00000.safetensors").read_bytes() == (
        b"new" if cut == "after" else b"old"
    )
    assert read_manifest(folder) is not None and [path.name for path in tmp_path.iterdir()] == [
        folder.name
    ]


def test_the_best_is_written_when_it_is_the_best_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def export(folder: Path, *given: Any) -> None:
        folder.mkdir(exist_ok=True)
        for name, text in given[-1].items():
            (folder / name).write_text(text)
        written.append(folder)

    monkeypatch.setattr("onellm_dist.train.callbacks.best_model.export_model", export)

    def open_best(digest: str) -> BestModel:
        return BestModel(
            tmp_path,
            engine=ONE_RANK,
            model=None,
            processor=None,
            dist=ONE_RANK,
            sample_digest=digest,
        )

    best = open_best("set")
    assert [
        best.update(step, loss) for step, loss in ((2, 3.0), (4, 3.5), (6, float("nan")), (8, 2.5))
    ] == [True, False, False, True]
    assert open_best("another set").loss is None, "losses of other samples are not compared"
    again = open_best("set")
    assert again.loss == 2.5 and not again.update(10, 2.5) and again.update(12, 2.0)
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {
        "steps_done": 12,
        "loss": 2.0,
        "sample_digest": "set",
    }
    assert len(written) == 3


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_the_best_weights_are_never_without_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Killed while the weights of step 8 replace those of step 4, around each of the renames."""
    engine: Any = SimpleNamespace(
        full_weights=lambda *_: iter(()), full_weight_shapes=lambda: (), compute_dtype=torch.float32
    )
    monkeypatch.setattr("onellm_dist.train.export.model._write_configs", lambda *_: None)
    folder = tmp_path / "best"

    def best() -> BestModel:
        return BestModel(
            tmp_path,
            engine=engine,
            model=torch.nn.Module(),
            processor=None,
            dist=ONE_RANK,
            sample_digest="set",
        )

    assert best().update(4, 3.0)
    killed_after(renames, monkeypatch)
    with pytest.raises(KeyboardInterrupt) if renames < 2 else nullcontext():
        best().update(8, 2.0)
    monkeypatch.undo()
    restore_folder(folder)
    assert best().loss == (3.0 if renames < 2 else 2.0) and (folder / "model.safetensors").is_file()


def test_a_checkpoint_that_is_cut_short_is_not_complete(tmp_path: Path) -> None:
    checkpoint(tmp_path / make_checkpoint_name(9))
    checkpoint(tmp_path / make_checkpoint_name(10))
    checkpoint(tmp_path / make_checkpoint_name(11), said=b"abcd")  # cut short
    (tmp_path / make_checkpoint_name(12)).mkdir()
    (tmp_path / f".{make_checkpoint_name(13)}.partial").mkdir()
    complete = [f.name for f in list_checkpoints(tmp_path) if read_manifest(f) is not None]
    assert complete == [make_checkpoint_name(9), make_checkpoint_name(10)]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_the_last_n_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        checkpoint(tmp_path / make_checkpoint_name(step))
    (tmp_path / f".{make_checkpoint_name(13)}.partial").mkdir()
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        make_checkpoint_name(4),
        make_checkpoint_name(10),
    ]
