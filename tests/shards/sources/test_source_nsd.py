"""`onellm shards build nsd`: MindEye's tars with the curated captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shard_worlds import foreign_tar
from source_checks import (
    build_source,
    decode_sample,
    get_reasons,
    make_npy,
    make_photo,
    make_turns,
    read_samples,
)

from onellm_dist.common.errors import OneLLMError, UsageError

VOXELS = 15724


def voxels(seed: int, repetitions: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(repetitions, VOXELS)).astype(np.float16)


def whole_numbers(seed: int) -> np.ndarray:
    """Percent times 300, as in NSD's own files; means of three repetitions are not integers."""
    return (voxels(seed) * 300).astype(np.int16)


def sample(key: str, picture: int, seed: int) -> list[tuple[str, bytes]]:
    """The parts in the order of MindEye's tars."""
    return [
        (f"{key}.coco73k.npy", make_npy(np.array([picture]))),
        (f"{key}.jpg", make_photo(seed=seed)),
        (f"{key}.nsdgeneral.npy", make_npy(voxels(seed))),
        (f"{key}.num_uniques.npy", make_npy(np.array([3]))),
        (f"{key}.trial.npy", make_npy(np.array([[seed], [seed + 1], [seed + 2]]))),
    ]


def tree(root: Path) -> Path:
    folder = root / "webdataset_avg_split"
    foreign_tar(
        folder / "train/train_subj01_0.tar",
        [m for i in range(3) for m in sample(f"sample00000{i}", 10 + i, i)],
    )
    foreign_tar(folder / "train/train_subj01_2.tar", sample("sample000003", 13, 3))
    foreign_tar(folder / "train/train_subj01_10.tar", sample("sample000004", 14, 4))
    foreign_tar(folder / "train/train_subj02_0.tar", sample("sample000000", 1, 9))
    foreign_tar(folder / "val/val_subj01_0.tar", sample("sample000000", 20, 5))
    foreign_tar(folder / "test/test_subj01_0.tar", sample("sample000000", 30, 6))
    foreign_tar(folder / "test/test_subj01_1.tar", sample("sample000001", 31, 7))
    captions = np.array([[f"picture {i} text {j} " for j in range(5)] for i in range(40)])
    (root / "COCO_73k_annots_curated.npy").write_bytes(make_npy(captions))
    return root


def test_mindeyes_tars(tmp_path: Path) -> None:
    report, dataset = build_source("nsd", tree(tmp_path / "in"), tmp_path / "out")
    assert not report.quarantined
    assert dataset.modalities == ("fmri",)
    assert dataset.splits == ("test", "train", "val") or set(dataset.splits) == {
        "train",
        "val",
        "test",
    }
    train = read_samples(dataset)
    # In the order of the tars' numbers.
    assert list(train) == [
        *(f"train_subj01_0-sample00000{i}" for i in range(3)),
        "train_subj01_2-sample000003",
        "train_subj01_10-sample000004",
    ]
    one = train["train_subj01_0-sample000001"]
    assert set(one) == {"fmri.npy", "json"}
    assert one["json"] == {
        "coco73k": 11,
        "caption": [f"picture 11 text {j}" for j in range(5)],
        "conversations": make_turns("Describe the scene based on fMRI data.", "picture 11 text 0"),
    }
    mean = voxels(1).astype(np.float64).mean(0).astype(np.float32)
    assert np.array_equal(
        decode_sample(dataset, "train_subj01_0-sample000001")["fmri"].numpy(), mean[None]
    )
    assert list(read_samples(dataset, "val")) == ["val_subj01_0-sample000000"]
    assert [s["json"]["coco73k"] for s in read_samples(dataset, "test").values()] == [30, 31]


def test_one_caption_and_the_inner_folder(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    _, dataset = build_source(
        "nsd",
        root / "webdataset_avg_split",
        tmp_path / "out",
        captions=str(root / "COCO_73k_annots_curated.npy"),
        texts="first",
    )
    assert [s["txt"] for s in read_samples(dataset, "val").values()] == ["picture 20 text 0"]
    assert dataset.manifest.text == ("txt", "json")
    assert dataset.samples() == 5


def test_captions_that_were_curated_away_cost_no_sample(tmp_path: Path) -> None:
    root = tmp_path / "in"
    foreign_tar(
        root / "webdataset_avg_split/train/train_subj01_0.tar",
        [m for i in range(2) for m in sample(f"s{i}", i, i)],
    )
    captions = np.array([["", "a dog", " ", "a cat", ""], [""] * 5])
    (root / "COCO_73k_annots_curated.npy").write_bytes(make_npy(captions))
    report, dataset = build_source("nsd", root, tmp_path / "out", max_failures=0.5)
    [one] = read_samples(dataset).values()
    assert one["json"]["caption"] == ["a dog", "a cat"]
    assert get_reasons(report) == {
        "train_subj01_0-s1": "empty caption: picture 1 has none in COCO_73k_annots_curated.npy"
    }


def test_bad_samples_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    folder = root / "webdataset_avg_split/train"
    good, wide, text, nan, lost, far = (sample(f"s{i}", i, i) for i in range(6))
    wide[2] = (wide[2][0], make_npy(np.zeros((3, 14278), np.float16)))
    text[2] = (text[2][0], make_npy(np.array(["a"])))
    nan[2] = (nan[2][0], make_npy(np.full((2, VOXELS), np.nan, np.float32)))
    far[0] = (far[0][0], make_npy(np.array([73000])))
    foreign_tar(
        folder / "train_subj01_11.tar",
        [*good, *wide, *text, *nan, *(m for m in lost if "nsdgeneral" not in m[0]), *far],
    )
    cut = foreign_tar(folder / "train_subj01_12.tar", [*sample("a", 1, 1), *sample("b", 2, 2)])
    cut.write_bytes(cut.read_bytes()[:-60_000])  # within b's voxels
    integers, floats = sample("i", 1, 1), sample("w", 1, 1)
    integers[2] = (integers[2][0], make_npy(np.zeros((3, VOXELS), np.int64)))
    floats[2] = (floats[2][0], make_npy(whole_numbers(1).astype(np.float32)))
    foreign_tar(folder / "train_subj01_13.tar", [*integers, *floats])
    report, dataset = build_source("nsd", root, tmp_path / "out", max_failures=0.6)
    why = {k.removeprefix("train_subj01_"): r for k, r in get_reasons(report).items()}
    starts = {
        "11-s1": "unreadable fmri: .fmri.npy has shape (14278,)",
        "11-s2": "unreadable fMRI: .nsdgeneral.npy",
        "11-s3": "unreadable fMRI: ",
        "11-s4": "missing part: no .nsdgeneral.npy",
        "11-s5": "no such picture: coco73k is [73000]",
        "12-b": "truncated file",
        "12-end": "truncated tar",
        "13-i": "unreadable fmri: .fmri.npy holds whole numbers (int64)",
        "13-w": "unreadable fmri: .fmri.npy holds whole numbers (float32)",
    }
    assert why.keys() == starts.keys()
    assert {n: r for n, r in why.items() if not r.startswith(starts[n])} == {}
    assert {"train_subj01_11-s0", "train_subj01_12-a"} < set(read_samples(dataset))
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("nsd", root, tmp_path / "none")


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_whole_numbers_are_divided_by_the_factor_that_the_build_states(
    dtype: type, tmp_path: Path
) -> None:
    root = tmp_path / "in"
    one = sample("s0", 1, 1)
    one[2] = (one[2][0], make_npy(whole_numbers(1).astype(dtype)))
    foreign_tar(root / "webdataset_avg_split/train/train_subj01_0.tar", one)
    captions = np.array([["a", "b"]] * 4)
    (root / "COCO_73k_annots_curated.npy").write_bytes(make_npy(captions))
    _, dataset = build_source("nsd", root, tmp_path / "out", describe="fmri_scale=300")
    mean = (whole_numbers(1).mean(0, dtype=np.float64) / 300).astype(np.float32)
    found = decode_sample(dataset, "train_subj01_0-s0")["fmri"].numpy()
    assert np.array_equal(found, mean[None])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    with pytest.raises(UsageError, match="train_subj07"):
        build_source("nsd", root, tmp_path / "out", subject=7)
    (root / "COCO_73k_annots_curated.npy").write_bytes(
        make_npy(np.array([["a", None]], dtype=object))
    )
    with pytest.raises(UsageError, match="without pickled objects"):
        build_source("nsd", root, tmp_path / "out")
    (root / "COCO_73k_annots_curated.npy").unlink()
    with pytest.raises(UsageError, match="captions=FILE"):
        build_source("nsd", root, tmp_path / "out")
