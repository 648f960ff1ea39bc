"""cap3d: headerless CSV with clouds in three forms, packed or not; PointLLM's copy."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_builds import build_recipe
from shard_worlds import write_tree
from source_checks import (
    build_source,
    decode_sample,
    get_reasons,
    make_cloud,
    make_npy,
    read_samples,
)

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.task import TooManyFailuresError

RECIPES = Path(__file__).parents[3] / "shards"
TABLE = "Cap3D_automated_Objaverse_full.csv"
UIDS = [f"{i:032x}" for i in range(4)]
CAPTIONS = ["a red chair", "a car, blue", 'a "robot"', "a tree"]


def csv_of(captions: list[str], uids: list[str] = UIDS) -> str:
    quoted = ('"' + c.replace('"', '""') + '"' for c in captions)
    return "".join(f"{u},{c}\n" for u, c in zip(uids, quoted, strict=False))


def ply(points: np.ndarray) -> bytes:
    """Binary, as Cap3D's: float x y z, uchar red green blue."""
    kinds = [
        ("x", "<f4"),
        ("y", "<f4"),
        ("z", "<f4"),
        ("red", "u1"),
        ("green", "u1"),
        ("blue", "u1"),
    ]
    table = np.zeros(len(points), kinds)
    for i, (name, kind) in enumerate(kinds):
        table[name] = points[:, i] if kind == "<f4" else np.round(points[:, i] * 255)
    header = "".join(f"property {'float' if k == '<f4' else 'uchar'} {n}\n" for n, k in kinds)
    return (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
        f"{header}end_header\n".encode()
        + table.tobytes()
    )


def pt(points: np.ndarray) -> bytes:
    """torch.save of [6, N], as Cap3D's."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(points.T.copy()), buffer)
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def clouds(count: int = 4) -> list[np.ndarray]:
    return [make_cloud(16384, seed=i) for i in range(count)]


def check_captions(found: dict[str, dict[str, Any]]) -> None:
    assert {k: s["txt"] for k, s in found.items()} == dict(zip(UIDS, CAPTIONS, strict=True))
    assert [s["json"] for s in found.values()] == [{"uid": u} for u in UIDS]


def test_clouds_of_every_form_and_place_come_through(tmp_path: Path) -> None:
    """A `.ply` and a `.npy` on disk, a `.ply` and a `.pt` in the archives that the Hub has."""
    points = clouds()
    files: dict[str, bytes | str] = {
        TABLE: csv_of(CAPTIONS),
        f"Cap3D_pcs/{UIDS[0]}.ply": ply(points[0]),
        f"8192_npy/{UIDS[1]}_8192.npy": make_npy(points[1][:8192]),
        "PointCloud_zips/compressed_pcs_00.zip": packed(
            {f"Cap3D_pcs/{UIDS[2]}.ply": ply(points[2])}
        ),
        "PointCloud_pt_zips/compressed_pcs_pt_00.zip": packed(
            {f"Cap3D_pcs_pt/{UIDS[3]}.pt": pt(points[3])}
        ),
    }
    _, dataset = build_source("cap3d", write_tree(tmp_path / "in", files), tmp_path / "out")
    found = read_samples(dataset)
    check_captions(found)
    assert found[UIDS[0]]["ply"] == ply(points[0])
    assert found[UIDS[1]]["npy"] == make_npy(points[1][:8192])
    assert found[UIDS[2]]["ply"] == ply(points[2])
    np.testing.assert_array_equal(np.load(io.BytesIO(found[UIDS[3]]["npy"])), points[3])
    for uid in UIDS:
        assert decode_sample(dataset, uid)["point"][:, :3].norm(dim=1).max() == pytest.approx(
            1, abs=1e-5
        )


def test_pointllms_copy(tmp_path: Path) -> None:
    rows = [
        {
            "object_id": u,
            "conversation_type": "simple_description",
            "conversations": [
                {"from": "human", "value": "<point>\nWhat is this?"},
                {"from": "gpt", "value": c},
            ],
        }
        for u, c in zip(UIDS, CAPTIONS, strict=True)
    ]
    files: dict[str, bytes | str] = {
        f"8192_npy/{u}_8192.npy": make_npy(make_cloud(seed=i)) for i, u in enumerate(UIDS)
    }
    files["PointLLM_brief_description_660K_filtered.json"] = json.dumps(rows)
    _, dataset = build_source("cap3d", write_tree(tmp_path / "in", files), tmp_path / "out")
    found = read_samples(dataset)
    assert {k: s["txt"] for k, s in found.items()} == dict(zip(UIDS, CAPTIONS, strict=True))
    assert found[UIDS[1]]["json"] == {
        "object_id": UIDS[1],
        "conversation_type": "simple_description",
    }
    assert found[UIDS[1]]["npy"] == make_npy(make_cloud(seed=1))

    rows[1]["conversations"] = [{"from": "human", "value": "<point>\nWhat is this?"}]
    rows[2].pop("object_id")
    rows[3]["object_id"] = "not there"
    (tmp_path / "in/PointLLM_brief_description_660K_filtered.json").write_text(json.dumps(rows))
    report, dataset = build_source("cap3d", tmp_path / "in", tmp_path / "bad", max_failures=0.9)
    assert list(read_samples(dataset)) == UIDS[:1]
    assert [r.split(":")[0] for r in get_reasons(report).values()] == [
        "malformed conversations",
        "unreadable row",
        "missing file",
    ]


class Evil:
    """Would write a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_bad_rows_and_clouds_are_left_out_one_by_one(tmp_path: Path) -> None:
    uids = [f"{i:032x}" for i in range(12)]
    good = make_cloud(64)
    buffer = io.BytesIO()
    torch.save({"points": torch.zeros(6, 64)}, buffer)
    integers = io.BytesIO()
    torch.save(torch.zeros(6, 64, dtype=torch.int64), integers)
    flat = io.BytesIO()
    torch.save(torch.zeros(3, 64), flat)
    bad = {
        1: (".npy", make_npy(good.astype("U4")), "unreadable"),
        2: (".npy", make_npy(good)[:400], "unreadable"),
        3: (".pt", pt(good)[:500], "unreadable .pt"),
        4: (".pt", buffer.getvalue(), "wrong type"),
        5: (".pt", integers.getvalue(), "wrong type"),
        6: (".pt", flat.getvalue(), "wrong shape"),
        7: (".pt", pickle.dumps(Evil(tmp_path / "owned")), "unreadable .pt"),
        8: (".ply", ply(good)[:300], ".ply"),
    }
    files: dict[str, bytes | str] = {
        f"c/{uids[i]}{suffix}": data for i, (suffix, data, _) in bad.items()
    }
    files[f"c/{uids[0]}.npy"] = files[f"c/{uids[9]}.npy"] = make_npy(good)
    captions = [f"object {i}" for i in range(12)]
    captions[9] = " "
    files[TABLE] = csv_of(captions[:11], uids) + "only one cell\n" + f'{uids[11]},"never closed\n'
    report, dataset = build_source(
        "cap3d", write_tree(tmp_path / "in", files), tmp_path / "out", max_failures=0.99
    )
    assert list(read_samples(dataset)) == [uids[0]]
    found = {q.file: q.reason for q in report.quarantined}
    for i, (_, _, reason) in bad.items():
        assert reason in found[f"{TABLE}:{i + 1}"]
    assert found[f"{TABLE}:10"] == "empty caption"
    assert found[f"{TABLE}:11"].startswith(f"missing file: {uids[10]}{{.npy,.pt,.ply}}")
    assert found[f"{TABLE}:12"] == "unreadable row: 1 columns where the header has 2"
    assert found[f"{TABLE}:13"] == "unreadable row: a quote is opened and not closed"
    assert not (tmp_path / "owned").exists()  # pickled code is never run
    with pytest.raises(TooManyFailuresError):
        build_dataset("cap3d", tmp_path / "in", tmp_path / "other")


def test_a_set_that_was_fetched_in_part_or_not_at_all(tmp_path: Path) -> None:
    write_tree(
        tmp_path / "in", {TABLE: csv_of(CAPTIONS), f"c/{UIDS[0]}.npy": make_npy(make_cloud(64))}
    )
    _, dataset = build_source("cap3d", tmp_path / "in", tmp_path / "out", missing="skip")
    assert list(read_samples(dataset)) == UIDS[:1]
    write_tree(tmp_path / "captions", {TABLE: csv_of(CAPTIONS)})
    with pytest.raises(UsageError, match="there are captions but no clouds"):
        build_dataset("cap3d", tmp_path / "captions", tmp_path / "x")
    write_tree(tmp_path / "in", {"Cap3D_human.csv": csv_of(CAPTIONS)})
    with pytest.raises(UsageError, match="has 2 tables"):
        build_dataset("cap3d", tmp_path / "in", tmp_path / "x")
    _, dataset = build_source(
        "cap3d", tmp_path / "in", tmp_path / "chosen", captions=TABLE, missing="skip"
    )
    assert dataset.samples() == 1
    with pytest.raises(UsageError, match="missing=maybe is neither fail nor skip"):
        build_dataset("cap3d", tmp_path / "in", tmp_path / "x", options={"missing": "maybe"})


def test_the_clouds_may_be_looked_for_in_one_folder(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        f"new/{UIDS[0]}.npy": make_npy(make_cloud(64)),
        f"old/{UIDS[0]}.npy": make_npy(make_cloud(64, seed=1)),
        "pictures/x.zip": b"",
    }
    write_tree(tmp_path / "in", {TABLE: csv_of(CAPTIONS[:1]), **files})
    with pytest.raises(UsageError, match=r"x.zip is not a readable zip archive"):
        build_dataset("cap3d", tmp_path / "in", tmp_path / "out")
    _, dataset = build_source("cap3d", tmp_path / "in", tmp_path / "out", clouds="old")
    assert read_samples(dataset)[UIDS[0]]["npy"] == make_npy(make_cloud(64, seed=1))
    with pytest.raises(UsageError, match=r"in/pict has no .npy, .pt, .ply or .zip"):
        build_dataset("cap3d", tmp_path / "in", tmp_path / "none", options={"clouds": "pict"})


def test_the_recipe_builds(tmp_path: Path) -> None:
    write_tree(
        tmp_path / "in",
        {TABLE: csv_of(CAPTIONS), **{f"c/{u}.npy": make_npy(make_cloud(64)) for u in UIDS}},
    )
    _, report = build_recipe(
        RECIPES / "cap3d.yaml", inputs=str(tmp_path / "in"), out=str(tmp_path / "out"), workers=1
    )
    assert report.samples == 4
