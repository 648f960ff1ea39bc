"""Samples with several media: numbered parts, `media` in the `.json`, columns of the index."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.common.media_size import MediaSize, SampleMedium
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.index import ShardIndex, get_index_path, pack_index
from onellm_dist.shards.format.media import LISTED, get_medium_meta, list_media, split_prefix
from onellm_dist.shards.format.tar_parts import TarParts
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.tools.index_existing import index_existing_shards
from onellm_dist.shards.tools.preview import preview_command
from onellm_dist.shards.tools.repair import repair_dataset
from onellm_dist.shards.tools.verify import verify_dataset

KNOWN = ("image", "audio", "depth", "imu")


def picture(width: int = 20, height: int = 10, orientation: int = 1) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def imu() -> bytes:
    out = io.BytesIO()
    np.save(out, np.random.default_rng(0).standard_normal((6, 400)).astype(np.float32))
    return out.getvalue()


def sample(media: list[str] | None, text: str = "a cube", **parts: bytes) -> dict[str, bytes]:
    meta = {"caption": text} | ({} if media is None else {"media": media})
    named = {name.replace("__", "."): data for name, data in parts.items()}
    return {k.lstrip("_"): v for k, v in named.items()} | {"json": json.dumps(meta).encode()}


def write(root: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Dataset:
    with DatasetWriter(root, name="many", modalities=("image", "imu"), attributes=LISTED) as writer:
        for key, parts in samples.items():
            writer.add("train", key, parts)
    return open_dataset(root)


@pytest.fixture
def many(tmp_path: Path) -> Dataset:
    return write(
        tmp_path / "many",
        {
            "a": {"0.jpg": picture(), "1.jpg": picture(30, 40), **sample(["image", "image"])},
            "b": sample([]),
            "c": {"0.imu.npy": imu(), "1.jpg": picture(7, 9, 6), **sample(["imu", "image"])},
            "d": {"jpg": picture(5, 5), **sample(None)},
        },
    )


def test_the_index_lists_media_and_their_sizes(many: Dataset) -> None:
    (shard,) = many.shards()
    media = many.index(shard).media
    assert media is not None and many.lists_media
    assert media.get(0) == (
        SampleMedium("image", "0", MediaSize(20, 10)),
        SampleMedium("image", "1", MediaSize(30, 40)),
    )
    assert media.get(1) == ()
    # EXIF says that the picture lies on its side
    assert media.get(2) == (SampleMedium("imu", "0"), SampleMedium("image", "1", MediaSize(9, 7)))
    assert media.get(3) == (SampleMedium("image", "", MediaSize(5, 5)),)
    assert verify_dataset(many.root) == []


def test_all_columns_survive_a_second_indexing_and_a_repair(many: Dataset) -> None:
    (shard,) = many.shards()
    path = get_index_path(many.tar_path(shard))
    before = path.read_bytes()
    index_existing_shards(many.root)
    assert path.read_bytes() == before
    path.unlink()
    repair_dataset(many.root)
    assert path.read_bytes() == before
    rows = ShardIndex(path).rows()
    rows.media = None
    index = ShardIndex(path)
    end = int(index.sample_starts()[-1])
    data = pack_index(
        rows,
        tar_name=index.tar_name,
        tar_bytes=index.tar_bytes,
        tar_sha256=index.tar_sha256,
        end=end,
    )
    path.write_bytes(data)
    assert [str(p) for p in verify_dataset(many.root)] == [
        f"{shard.path}: stale index: it does not list the media of the samples"
    ]
    repair_dataset(many.root)
    assert path.read_bytes() == before


def test_a_repair_renews_media_that_the_index_lists_wrongly(many: Dataset) -> None:
    (shard,) = many.shards()
    index, path = many.index(shard), get_index_path(many.tar_path(shard))
    before, rows, end = path.read_bytes(), index.rows(), int(index.sample_starts()[-1])
    assert rows.media is not None
    rows.media[3] = (SampleMedium("image", "", MediaSize(6, 6)),)
    names = {"tar_name": index.tar_name, "tar_sha256": index.tar_sha256}
    path.write_bytes(pack_index(rows, tar_bytes=index.tar_bytes, end=end, **names))
    assert len(verify_dataset(many.root)) == 1
    repair_dataset(many.root)
    assert path.read_bytes() == before and repair_dataset(many.root) == []


def test_a_repaired_shard_keeps_the_media_of_its_good_samples(many: Dataset) -> None:
    (shard,) = many.shards()
    tar = many.tar_path(shard)
    place = many.index(shard).parts(0)["1.jpg"]
    data = bytearray(tar.read_bytes())
    data[place.offset + 30] ^= 255
    tar.write_bytes(data)
    repair_dataset(many.root)
    repaired = open_dataset(many.root)
    media = repaired.index(repaired.shards()[0]).media
    assert media is not None and [len(media.get(row)) for row in range(3)] == [0, 2, 1]
    assert verify_dataset(many.root) == []


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"0.jpg": b"x", **sample(["image", "image"])}, "lists 2 media .* parts of 1"),
        ({"0.jpg": b"x", "1.jpg": b"x", **sample(["image"])}, "lists 1 medium .* parts of 2"),
        ({"0.jpg": b"x", **sample(["audio"])}, "not a modality of the dataset"),
        ({"0.jpg": b"x", **sample(["imu"])}, "medium 0: no imu part"),
        ({"0.jpg": b"x", "jpg": b"x", **sample(None)}, "numbered media and .jpg beside"),
        ({"0.wav": b"x", **sample(None)}, "media of no modality of the dataset"),
        (sample(["image"]), "lists 1 medium .* parts of 0"),
    ],
)
def test_media_that_do_not_fit_are_refused(
    tmp_path: Path, parts: dict[str, bytes], words: str
) -> None:
    writer = DatasetWriter(
        tmp_path / "bad", name="bad", modalities=("image", "imu"), attributes=LISTED
    )
    writer.add("train", "good", sample(["image"], _0__jpg=picture()))
    with pytest.raises(SampleError, match=words):
        writer.add("train", "a", parts)
    writer.finish()
    assert open_dataset(tmp_path / "bad").samples() == 1


def test_names_of_prefixes() -> None:
    assert split_prefix("0.jpg") == ("0", "jpg")
    assert split_prefix("img12.jpg") == ("img12", "jpg")
    assert split_prefix("image_1.depth.png") == ("image_1", "depth.png")
    for plain in ("jpg", "depth.png", "0.txt", "0.json", "x.jpg", "seg9"):
        assert split_prefix(plain) == ("", plain)
    order = list_media({"10.jpg", "9.jpg", "2.wav"}, {}, KNOWN)
    assert [(m.modality, m.prefix) for m in order] == [
        ("audio", "2"),
        ("image", "9"),
        ("image", "10"),
    ]


def test_a_medium_may_have_keys_of_its_own() -> None:
    meta = {"depth_is_distance": False, "media": ["image", {"modality": "imu", "rate": 50}]}
    assert get_medium_meta(meta, 1)["rate"] == 50
    assert "rate" not in get_medium_meta(meta, 0)
    listed = list_media({"0.jpg", "1.imu.npy", "json"}, meta, KNOWN)
    assert [m.modality for m in listed] == ["image", "imu"]


def test_tars_of_others_are_indexed_with_their_media(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaVA-OneVision-1.5's form: K.img0.jpg, K.img1.jpg, K.json, counts that differ."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "00.tar", "w") as tar:
        for key, count in (("a", 2), ("b", 0), ("c", 3)):
            talk = [
                {"role": "user", "content": "<image>" * count + "what"},
                {"role": "assistant", "content": "a cube"},
            ]
            files = {f"{key}.img{i}.jpg": picture(10 + i, 20) for i in range(count)}
            files[f"{key}.json"] = json.dumps({"messages": talk}).encode()
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UsageError, match="no file there is media of a known modality"):
        index_existing_shards(folder)
    index_existing_shards(folder, media=True)
    dataset = open_dataset(folder)
    assert dataset.lists_media and dataset.modalities == ("image",)
    media = dataset.index(dataset.shards()[0]).media
    assert media is not None
    assert [m.size.width for m in media.get(2)] == [10, 11, 12]
    assert verify_dataset(folder) == []
    assert preview_command(str(folder), tmp_path / "page.html", previews=3) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img alt="image"') == 5 and "each sample lists its media" in page
    with pytest.raises(UsageError, match="--media of a single tar"):
        index_existing_shards(folder / "00.tar", media=True)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tars_of_one_picture_a_sample_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their indexes get sizes; the dataset lists no media, and pictures are not read completely."""
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    large = out.getvalue()
    folder = tmp_path / "laion"
    files = {"a.jpg": large, "a.txt": b"noise", "b.png": picture(30, 20), "b.txt": b"<image> b"}
    write_tar(folder / "00.tar", files)
    index_existing_shards(folder)
    before = open_dataset(folder).fingerprint()
    read: list[int] = []
    real = TarParts.__getitem__

    def count(self: TarParts, extension: str) -> bytes:
        data = real(self, extension)
        read.append(len(data))
        return data

    monkeypatch.setattr(TarParts, "__getitem__", count)
    index_existing_shards(folder, media=True)
    assert sum(read) < 200_000 < len(large)
    dataset = open_dataset(folder)
    assert not dataset.lists_media and dataset.fingerprint() == before
    media = dataset.index(dataset.shards()[0]).media
    assert media is not None
    assert [media.get(row)[0].size[:2] for row in range(2)] == [(1200, 900), (30, 20)]
    assert verify_dataset(folder) == []


def test_parts_that_several_modalities_read_are_named(tmp_path: Path) -> None:
    """Features beside pictures are not point clouds, recordings and responses."""
    folder = tmp_path / "foreign"
    write_tar(folder / "00.tar", {"a.jpg": picture(), "a.npy": b"x", "a.txt": b"t", "b.txt": b"t"})
    with pytest.raises(UsageError, match=r"\.npy there may be point or imu or fmri"):
        index_existing_shards(folder, media=True)
    index_existing_shards(folder, media=True, modalities=["image"])
    dataset = open_dataset(folder)
    media = dataset.index(dataset.shards()[0]).media
    assert dataset.lists_media and media is not None
    assert [[m.modality for m in media.get(row)] for row in range(2)] == [["image"], []]


def test_a_foreign_tar_whose_media_are_unclear_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "00.tar", "w") as tar:
        for name, data in (("k.0.jpg", picture()), ("k.json", b'{"media": ["image", "image"]}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(OneLLMError, match=r"00.tar, key k: its .json lists 2 media"):
        index_existing_shards(folder, media=True)
    assert not (folder / "manifest.json").exists()


def test_damaged_columns_are_refused(many: Dataset) -> None:
    (shard,) = many.shards()
    index = many.index(shard)
    rows = index.rows()
    assert rows.media is not None
    rows.media[0] = (SampleMedium("image", "0", MediaSize(seconds=float("nan"))),)
    data = pack_index(
        rows,
        tar_name=index.tar_name,
        tar_bytes=index.tar_bytes,
        tar_sha256=index.tar_sha256,
        end=int(index.sample_starts()[-1]),
    )
    path = get_index_path(many.tar_path(shard))
    path.write_bytes(data)
    with pytest.raises(OneLLMError, match="not a time"):
        ShardIndex(path)
