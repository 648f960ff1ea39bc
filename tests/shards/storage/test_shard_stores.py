"""Stores as input and output of a build: memory:// and S3 (moto's server) give the same bytes."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from shard_worlds import all_bytes, write_tree
from source_checks import make_cloud, make_film, make_npy, make_photo, make_tone
from source_trees import write_download
from stores import local_s3, stored, upload

from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.workers import ArrayTask


def laion_tree(root: Path) -> Path:
    """Two tars of img2dataset, one with a failed download and a bad picture."""
    rows: list[dict[str, Any]] = [
        {
            "url": f"http://x/{i}",
            "caption": f"picture {i}",
            "NSFW": "UNLIKELY",
            "media": make_photo(seed=i),
        }
        for i in range(5)
    ]
    rows[1]["media"] = b"no picture"
    rows.append(
        {"url": "http://x/gone", "caption": "gone", "status": "failed_to_download", "media": None}
    )
    write_download(root, 0, rows)
    write_download(
        root,
        1,
        [{"url": "http://x/a", "caption": "one more", "NSFW": "NSFW", "media": make_photo(seed=9)}],
    )
    return root


def webvid_tree(root: Path) -> Path:
    """A CSV whose second film is not there."""
    table = "videoid,contentUrl,duration,page_dir,name\n1,http://x/1,PT00H00M02S,a,a film\n2,http://x/2,PT00H00M02S,a,gone\n"
    return write_tree(root, {"results_2M_train.csv": table, "videos/a/1.mp4": make_film()})


def wavcaps_tree(root: Path) -> Path:
    """One source, one sound unpacked."""
    rows = {
        "num_captions_per_audio": 1,
        "data": [{"id": "1", "caption": "A tone."}, {"id": "2", "caption": ""}],
    }
    files: dict[str, bytes | str] = {"json_files/FreeSound/fsd_final.json": json.dumps(rows)}
    return write_tree(
        root, {**files, "FreeSound_flac/1.flac": make_tone(), "FreeSound_flac/2.flac": make_tone()}
    )


def cap3d_tree(root: Path) -> Path:
    """A cloud in a folder, one in an archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Cap3D_npys/u3.npy", make_npy(make_cloud(64, seed=3)))
    files: dict[str, bytes | str] = {
        "c.csv": "u1,a cloud\nu2,gone\nu3,another cloud\n",
        "8192_npy/u1_8192.npy": make_npy(make_cloud(64)),
    }
    return write_tree(root, {**files, "zips/00.zip": packed.getvalue()})


def reference_tree(root: Path) -> Path:
    """A list and its pictures."""
    return write_tree(
        root,
        {"a.csv": "caption\turl\na picture\tp/1.jpg\ngone\tp/2.jpg\n", "p/1.jpg": make_photo()},
    )


TREES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "cap3d": (cap3d_tree, {}),
    "laion-coco": (laion_tree, {"caption": "alt"}),
    "laion400m": (laion_tree, {}),
    "reference-lists": (reference_tree, {"modality": "image"}),
    "wavcaps": (wavcaps_tree, {"sources": "FreeSound"}),
    "webvid": (webvid_tree, {}),
}
OPTIONS: dict[str, Any] = {"name": "same", "max_failures": 0.9, "max_samples": 3, "dedup": "exact"}


def without_folders(files: dict[str, bytes]) -> dict[str, bytes]:
    """Missing files' reasons hold whole paths, which differ between stores."""
    return {k: v for k, v in files.items() if k != "quarantine.jsonl"}


def check_store(tmp_path: Path, url: str, source: str) -> None:
    """From the store to the disk, from the disk to the store, and within the store by two tasks."""
    tree, own = TREES[source]
    inputs, options = tree(tmp_path / "in"), {**OPTIONS, **own}
    local = build_dataset(source, inputs, tmp_path / "out", options=options)
    expected = without_folders(all_bytes(tmp_path / "out"))
    upload(inputs, f"{url}/in")
    report = build_dataset(source, f"{url}/in", tmp_path / "fetched", options=options)
    assert [(q.key, q.file, q.reason.split(":")[0]) for q in report.quarantined] == [
        (q.key, q.file, q.reason.split(":")[0]) for q in local.quarantined
    ]
    assert without_folders(all_bytes(tmp_path / "fetched")) == expected
    build_dataset(source, inputs, f"{url}/sent", options=options)
    assert without_folders(stored(f"{url}/sent")) == expected
    for number in range(2):
        build_dataset(
            source, f"{url}/in", f"{url}/shared", options=options, task=ArrayTask(number, 2)
        )
    assert without_folders(stored(f"{url}/shared")) == expected


@pytest.mark.parametrize("source", sorted(TREES))
@pytest.mark.seconds
def test_a_store_in_memory_gives_and_takes_the_same_bytes(tmp_path: Path, source: str) -> None:
    url = f"memory://{source}"
    check_store(tmp_path, url, source)
    fsspec.filesystem("memory").rm(f"/{source}", recursive=True)


S3_SOURCES = [
    source if source in ("laion-coco", "wavcaps") else pytest.param(source, marks=pytest.mark.soak)
    for source in sorted(TREES)
]
"""One of tables and one of files; every source is read from the store in memory."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with local_s3("lake") as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("source", S3_SOURCES)
def test_s3_gives_and_takes_the_same_bytes(tmp_path: Path, bucket: str, source: str) -> None:
    pytest.importorskip("s3fs")
    check_store(tmp_path, f"{bucket}/{source}", source)
