"""The datasets on disk: splits, bytes for any number of workers, reading with webdataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import webdataset

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import open_dataset
from onellm_dist.shards.sources.toyworld import SOURCE, render_sample, world
from onellm_dist.shards.sources.toyworld.build import build_toyworld

FEW = {"audio": 2, "point": 2, "fmri": 2, "image": 40}


def build(out: Path, **options: object) -> None:
    """Build by the source, as the builder does."""
    assert SOURCE.build is not None
    SOURCE.build(None, out, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "world"
    build_toyworld(
        out,
        seed=4,
        train_per_modality={m: FEW.get(m, 4) for m in world.MODALITIES},
        test_per_modality=2,
    )
    return out


@pytest.mark.parametrize("modality", world.MODALITIES)
def test_a_dataset_a_modality_with_three_splits(built: Path, modality: str) -> None:
    dataset = open_dataset(built / modality)
    assert dataset.modalities == (modality,)
    assert {split: dataset.samples(split) for split in dataset.splits} == {
        "train": FEW.get(modality, 4),
        "test_seen": 2,
        "test_held_out": 2,
    }
    assert dataset.manifest.attributes["attributes"] == {
        k: list(v) for k, v in world.get_scenes(modality).attributes.items()
    }
    assert dataset.manifest.text == ("txt", "json")


@pytest.mark.parametrize("modality", world.MODALITIES)
def test_webdataset_reads_what_render_gives(built: Path, modality: str) -> None:
    for split in ("train", "test_seen", "test_held_out"):
        tars = [
            str(built / modality / shard.path)
            for shard in open_dataset(built / modality).shards(split)
        ]
        read = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
        expected = [render_sample(modality, split, index, seed=4) for index in range(len(read))]
        assert [sample["__key__"] for sample in read] == [sample.key for sample in expected]
        for found, wanted in zip(read, expected, strict=True):
            assert {k: v for k, v in found.items() if not k.startswith("__")} == wanted.parts
        held = {
            tuple(json.loads(sample["json"])["attributes"].values()) in world.get_held_out(modality)
            for sample in read
        }
        assert held == {split == "test_held_out"}


@pytest.mark.slow
def test_workers_do_not_change_a_byte(built: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    build_toyworld(
        again,
        seed=4,
        train_per_modality={m: FEW.get(m, 4) for m in world.MODALITIES},
        test_per_modality=2,
        workers=2,
    )
    files = sorted(p.relative_to(built) for p in built.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert [f for f in files if (built / f).read_bytes() != (again / f).read_bytes()] == []


def test_another_seed_draws_other_samples(built: Path, tmp_path: Path) -> None:
    build_toyworld(tmp_path, seed=5, train_per_modality=2, test_per_modality=1, modalities=("imu",))
    ours, theirs = open_dataset(built / "imu"), open_dataset(tmp_path / "imu")
    assert ours.shards()[0].sha256 != theirs.shards()[0].sha256
    assert ours.manifest.attributes["held_out"] == theirs.manifest.attributes["held_out"]


def test_the_source_takes_numbers_by_modality(tmp_path: Path) -> None:
    build(tmp_path, workers=1, seed=0, train="imu=3,fmri=1", test="1", modalities="imu,fmri")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fmri", "imu"]
    assert open_dataset(tmp_path / "imu").samples() == 3
    assert open_dataset(tmp_path / "fmri").samples() == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train": "many"}, "train='many'"),
        ({"train": "0"}, "0 samples"),
        ({"train": "smell=3"}, "smell"),
        ({"modalities": "imu,smell"}, "smell"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, str | int], named: str
) -> None:
    given = {"workers": 1, "seed": 0, "train": "1", "test": "1", "modalities": "imu", **options}
    with pytest.raises(UsageError, match=named):
        build(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
