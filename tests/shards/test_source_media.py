"""Sources whose samples list their media: forms of instruction data, documents, broken rows."""

from __future__ import annotations

import hashlib
import io
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.build.build_dataset import build_dataset
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.registry import complete_options, get_source
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.sources.base import BuildReport, RawSample


def picture(seed: int = 0, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((np.sin(np.arange(8000) / 9) * 9000).astype("<i2").tobytes())
    return out.getvalue()


def build(source: str, inputs: Path, **options: Any) -> tuple[Dataset, BuildReport]:
    out = inputs.parent / f"{source}-out"
    report = build_dataset(source, inputs, out, options={"max_failures": 1.0, **options})
    assert report is not None
    return open_dataset(out), report


def read_all(dataset: Dataset) -> dict[str, tuple[dict[str, bytes], dict[str, Any]]]:
    """Key to the media parts and the `.json` of each sample."""
    found = {}
    for shard in dataset.shards():
        index = dataset.index(shard)
        assert index.media is not None
        for row in range(index.samples):
            parts = {e: p.data for e, p in read_parts(dataset, shard, row).items()}
            meta = json.loads(parts.pop("json"))
            assert [m.modality for m in index.media.get(row)] == meta["media"]
            if "txt" in parts:
                meta["txt"] = parts.pop("txt").decode()
            found[index.key(row)] = parts, meta
    return found


def talk(question: Any, answer: str = "yes", *, openai: bool = False) -> list[dict[str, Any]]:
    who, what, names = (
        ("role", "content", ("user", "assistant"))
        if openai
        else ("from", "value", ("human", "gpt"))
    )
    return [{who: names[0], what: question}, {who: names[1], what: answer}]


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "rows.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(list(rows)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "pics").mkdir(parents=True)
    for number in range(4):
        (folder / "pics" / f"{number}.jpg").write_bytes(picture(number))
    (folder / "a.wav").write_bytes(sound())
    return folder


def test_every_form_of_conversations_with_media(folder: Path) -> None:
    a, b, c = (f"pics/{i}.jpg" for i in range(3))
    rows: list[Any] = [
        {"id": 7, "image": a, "conversations": talk("<image>\nwhat")},
        {
            "id": "m4",
            "image": [a, b],
            "conversations": talk("From <image> to <image>?"),
            "metadata": {"dataset": "NLVR2"},
        },
        {
            "images": [b, c],
            "audios": ["a.wav"],
            "messages": talk("<audio><image> or <image>", openai=True),
        },
        {
            "messages": talk(
                [
                    {"type": "text", "text": "see "},
                    {"type": "image", "image": c},
                    {"type": "image_url", "image_url": {"url": f"file://{b}"}},
                    {"type": "text", "text": " ok"},
                ],
                openai=True,
            )
        },
        {"conversations": talk("no medium at all")},
        {"image": [a, b], "conversations": talk("behind BOS")},
        {"audio": "a.wav", "conversations": talk("<speech> what was said")},
    ]
    dataset, report = build("interleaved", write_rows(folder, rows), modality="image,audio")
    assert report.failures == 0 and dataset.lists_media
    assert dataset.modalities == ("image", "audio")
    found = list(read_all(dataset).values())
    assert [meta["media"] for _, meta in found] == [
        ["image"],
        ["image", "image"],
        ["image", "image", "audio"],
        ["image", "image"],
        [],
        ["image", "image"],
        ["audio"],
    ]
    assert [meta["conversations"][0]["value"] for _, meta in found] == [
        "<image>\nwhat",
        "From <image> to <image>?",
        "<audio><image> or <image>",
        "see <image><image> ok",
        "no medium at all",
        "behind BOS",
        "<audio> what was said",
    ]
    assert [set(parts) for parts, _ in found][2] == {"0.jpg", "1.jpg", "2.wav"}
    assert found[3][0] == {"0.jpg": picture(2), "1.jpg": picture(1)}
    assert (found[0][1]["id"], found[1][1]["metadata"]) == (7, {"dataset": "NLVR2"})


def test_sharegpt_with_lists_of_media(folder: Path) -> None:
    """With a modality as `interleaved`; without one, a row that has media is no text alone."""
    rows: list[Any] = [
        {
            "id": "a",
            "images": ["pics/0.jpg", "pics/1.jpg"],
            "conversations": talk("<image> <image>"),
        },
        {"id": "b", "conversations": talk("say <image> in HTML")},
        {"id": "c", "conversations": talk("hello")},
        {"id": "d", "image": "pics/none.jpg", "conversations": talk("<image>")},
    ]
    dataset, report = build("sharegpt", write_rows(folder, rows), modality="image")
    (first, meta), (second, other) = read_all(dataset).values()
    assert dataset.lists_media and set(first) == {"0.jpg", "1.jpg"} and not second
    assert (meta["media"], meta["id"], other["media"]) == (["image", "image"], "a", [])
    assert [q.reason for q in report.quarantined] == [
        "placeholders: its text has 1 <image> for 0 media of modality image",
        "missing file: pics/none.jpg",
    ]
    (folder.parent / "sharegpt-out").rename(folder.parent / "before")
    plain, report = build("sharegpt", folder)
    assert not plain.lists_media and plain.modalities == () and plain.samples() == 2
    assert [q.reason for q in report.quarantined] == [
        "media: the row has image, and the dataset is text alone (-o modality=image builds such "
        "rows)"
    ] * 2


def test_folders_with_lists_of_media(folder: Path) -> None:
    """Columns that name any number of files, in the order of the row; broken rows by name."""
    (folder / "b.npy").write_bytes(b"")
    pics = [f"pics/{i}.jpg" for i in range(3)]
    rows: list[Any] = [
        {"images": pics, "text": "<image> then <image> and <image>"},
        {"id": "s", "audio": "a.wav", "images": pics[:1], "conversations": talk("<image> <audio>")},
        {"images": [], "text": "no medium"},
        {"file_names": [pics[1], "a.wav"], "text": "behind BOS"},
        {"images": ["pics/none.jpg"], "text": "x"},
        {"images": pics[:2], "text": "one <image>"},
        {"images": [5], "text": "x"},
        {"file_names": ["b.npy"], "text": "x"},
        {"images": ["https://a.b/c.jpg"], "text": "x"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines)
    dataset, report = build("folder", folder, modality="image,audio", several="list")
    assert dataset.lists_media and dataset.modalities == ("image", "audio")
    found = read_all(dataset)
    assert [m["media"] for _, m in found.values()] == [
        ["image"] * 3,
        ["audio", "image"],
        [],
        ["image", "audio"],
    ]
    assert list(found) == ["row-000000000", "s", "row-000000002", "row-000000003"]
    assert found["row-000000000"][0] == {f"{i}.jpg": picture(i) for i in range(3)}
    assert set(found["s"][0]) == {"0.wav", "1.jpg"} and "images" not in found["s"][1]
    reasons = [q.reason for q in report.quarantined]
    for words in (
        "missing file: pics/none.jpg",
        "its text has 1 <image> for 2 media",
        "images has a int, not a file name",
        "b.npy in column file_names may be none of image, audio",
        "is a URL; download it first",
    ):
        assert any(words in reason for reason in reasons), (words, reasons)
    assert len(reasons) == 5
    (folder.parent / "folder-out").rename(folder.parent / "before")
    for keys, words in (
        ({"several": "some"}, "neither fail nor list"),
        ({"several": "list"}, "without modality="),
        ({"several": "list", "modality": "depth"}, "depth is read from several files"),
    ):
        with pytest.raises(UsageError, match=words):
            build("folder", folder, **keys)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UsageError, match="several=list without a table"):
        build("folder", folder, several="list", modality="image")


def test_broken_rows_are_named(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(picture()[:300])
    a = "pics/0.jpg"
    rows: list[Any] = [
        {"image": a, "conversations": talk("<image>")},
        {"image": a, "conversations": talk("<image> <image>")},
        {"image": None, "conversations": talk("<image> lost")},
        {"image": [a, a], "conversations": talk("one <image>")},
        {"image": "pics/none.jpg", "conversations": talk("<image>")},
        {"image": "../secret.jpg", "conversations": talk("<image>")},
        {"image": "https://x/y.jpg", "conversations": talk("<image>")},
        {"image": 5, "conversations": talk("<image>")},
        {"audio": "a.wav", "conversations": talk("<audio>")},
        {"image": "broken.jpg", "conversations": talk("<image>")},
        {"image": a, "conversations": [{"from": "human", "value": "<image>"}]},
        "no row",
    ]
    dataset, report = build("m4-instruct", write_rows(folder, rows), modality="image")
    assert dataset.samples() == 1
    reasons = [q.reason for q in report.quarantined]
    for reason, words in zip(
        reasons,
        (
            "placeholders: its text has 2 <image> for 1 media",
            "placeholders: its text has 1 <image> for 0 media",
            "placeholders: its text has 1 <image> for 2 media",
            "missing file: pics/none.jpg",
            "leads out of the folder",
            "is a URL; download it first",
            "image is 5, not the name of a file",
            "media of another modality: the row has audio",
            "unreadable image",
            "no answer",
            "unreadable row: a str, not an object",
        ),
        strict=True,
    ):
        assert words in reason


def test_rows_of_films_may_say_image(folder: Path) -> None:
    """LLaVA's video data has <image> beside the key `video`, without an image."""
    from onellm_dist.shards.sources.readers.annotations import AnnotationContext
    from onellm_dist.shards.sources.readers.media_rows import read_media_row

    (folder / "v.mp4").write_bytes(b"x")
    context = AnnotationContext(folder, (folder,), {}, {})
    row = {"video": "v", "conversations": talk("<image>\nwhat")}
    sample = read_media_row(context, row, "k", ("image", "video"), {})
    assert sample.meta["media"] == ["video"] and set(sample.parts) == {"0.mp4"}
    assert sample.conversations[0]["value"] == "<video>\nwhat"
    both = {
        "image": "pics/0.jpg",
        "video": "v.mp4",
        "conversations": talk("<image> <Video></Video>"),
    }
    sample = read_media_row(context, both, "k", ("image", "video"), {})
    assert sample.meta["media"] == ["image", "video"]
    assert sample.conversations[0]["value"] == "<image> <video>"


def test_llava665k_with_all_its_rows(folder: Path) -> None:
    rows: list[Any] = [
        {"id": "1", "image": "pics/0.jpg", "conversations": talk("<image>\na")},
        {"id": "2", "conversations": talk("text alone")},
        {"id": "3", "image": ["pics/1.gif", "pics/2.jpg"], "conversations": talk("<image><image>")},
    ]
    write_rows(folder, rows, "llava_v1_5_mix665k.json")
    dataset, report = build("llava665k", folder, rows="all")
    assert report.failures == 0
    found = read_all(dataset)
    assert [found[k][1]["media"] for k in ("000000", "000001", "000002")] == [
        ["image"],
        [],
        ["image", "image"],
    ]
    assert found["000002"][0] == {"0.jpg": picture(1), "1.jpg": picture(2)}


def test_onellms_own_rows_with_lists(tmp_path: Path) -> None:
    root = tmp_path / "InstructionTuning"
    (root / "depth_normal").mkdir(parents=True)
    for number in range(2):
        (root / f"{number}.jpg").write_bytes(picture(number))
        (root / f"{number}_d.png").write_bytes(picture(9 + number, "PNG"))
    rows: list[Any] = [
        {
            "image": ["0.jpg", "1.jpg"],
            "depth_image": ["0_d.png", "1_d.png"],
            "conversations": talk("<rgbd> nearer than <rgbd>?"),
        },
        {"image": "1.jpg", "depth_image": "1_d.png", "conversations": talk("how far")},
    ]
    write_rows(root / "depth_normal", rows, "llava_instruct_50k_depth.json")
    dataset, report = build("onellm-instruct", root, modality="depth", listed=True)
    assert report.failures == 0
    (first, meta), (second, _) = read_all(dataset).values()
    assert set(first) == {"0.jpg", "0.depth.png", "1.jpg", "1.depth.png"}
    assert meta["conversations"][0]["value"] == "<depth> nearer than <depth>?"
    assert second["0.depth.png"] == picture(10, "PNG")


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def test_finevision_with_several_pictures(tmp_path: Path) -> None:
    def held(*seeds: int) -> list[dict[str, Any]]:
        return [{"bytes": picture(s), "path": None} for s in seeds]

    pairs = [{"user": "which", "assistant": "the first"}]
    rows: list[Any] = [
        {"images": held(0, 1, 2), "texts": pairs, "source": "x"},
        {"images": held(3), "texts": pairs, "source": "x"},
        {"images": [], "texts": pairs, "source": "text"},
        {"images": held(0), "texts": [{"user": "<image><image>", "assistant": "a"}], "source": "x"},
    ]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "train-0.parquet", rows)
    dataset, report = build("finevision", tmp_path / "in", several="list")
    assert [q.reason for q in report.quarantined] == [
        "placeholders: its text has 2 <image> for 1 media of modality image"
    ]
    found = list(read_all(dataset).values())
    assert [len(meta["media"]) for _, meta in found] == [3, 1, 0]
    assert found[0][0] == {f"{i}.jpg": picture(i) for i in range(3)}
    assert found[0][1]["conversations"][1]["value"] == "the first"


def test_parts_of_two_columns_stay_with_their_medium(tmp_path: Path) -> None:
    """The times of recordings are an optional part: they are no pictures."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)

    def held(array: np.ndarray, name: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return {"bytes": buffer.getvalue(), "path": name}

    motions = [held(rng.standard_normal((6, 400)).astype(np.float32), "m.npy") for _ in range(2)]
    times = [held(np.arange(400) * 5.0 + start, "t.npy") for start in (0, 7)]
    row = {
        "imu": motions,
        "timestamps": times,
        "image": [{"bytes": picture(), "path": "a.jpg"}],
        "caption": "<imu> <image> <imu>",
    }
    write_parquet(tmp_path / "in" / "t.parquet", [row, {**row, "timestamps": times[:1]}])
    dataset, report = build("parquet", tmp_path / "in", modality="imu,image", several="list")
    assert [q.reason for q in report.quarantined] == [
        "unreadable row: timestamps has 1 items for 2 of imu"
    ]
    ((parts, meta),) = read_all(dataset).values()
    assert sorted(meta["media"]) == ["image", "imu", "imu"]
    (number,) = (n for n, name in enumerate(meta["media"]) if name == "image")
    assert parts[f"{number}.jpg"] == picture()
    first, second = (n for n, name in enumerate(meta["media"]) if name == "imu")
    for at, motion, time in zip((first, second), motions, times, strict=True):
        assert parts[f"{at}.imu.npy"] == motion["bytes"]
        assert parts[f"{at}.timestamps.npy"] == time["bytes"]


def test_llava_onevision_keeps_its_placeholders(tmp_path: Path) -> None:
    held = {"bytes": picture(), "path": "a.jpg"}
    rows: list[Any] = [
        {"id": "1", "image": held, "conversations": talk("<image>\nwhat"), "data_source": "s"},
        {"id": "2", "image": None, "conversations": talk("text"), "data_source": "s"},
        {"id": "3", "image": None, "conversations": talk("<image>\nlost"), "data_source": "s"},
    ]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "train-0.parquet", rows)
    dataset, report = build("llava-onevision", tmp_path / "in", several="list")
    assert [q.reason for q in report.quarantined] == [
        "placeholders: its text has 1 <image> for 0 media of modality image"
    ]
    first, second = (meta for _, meta in read_all(dataset).values())
    assert (first["media"], second["media"]) == (["image"], [])
    assert first["conversations"][0]["value"] == "<image>\nwhat"


URL = "https://site.org/deep/cat.jpg?w=1"


def _write_documents(folder: Path, rows: Sequence[Mapping[str, Any]], name: str) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "cat.jpg").write_bytes(picture(1))
    digest = hashlib.sha256(b"https://a.b/c").hexdigest()
    (folder / "images" / digest).with_suffix(".jpg").write_bytes(picture(2))
    if name.endswith(".parquet"):
        write_parquet(folder / name, rows)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.parquet"])
def test_obelics_documents(tmp_path: Path, name: str) -> None:
    rows: list[Any] = [
        {
            "images": [None, URL, None, "https://a.b/c", "https://gone/x.png"],
            "texts": ["A cat.", None, "Then", None, None],
        },
        {"images": ["https://gone/x.png", None], "texts": [None, "nothing left"]},
        {"images": [None], "texts": ["a", "b"]},
        {"images": [None, URL], "texts": ["has <image> of its own", None]},
        {"images": [URL, "y"], "texts": ["both", None]},
    ]
    dataset, report = build("obelics", _write_documents(tmp_path / "in", rows, name), names="last")
    ((parts, meta),) = read_all(dataset).values()
    assert meta["txt"] == "A cat.\n<image>\nThen\n<image>"
    assert parts == {"0.jpg": picture(1), "1.jpg": picture(2)}
    assert [q.reason for q in report.quarantined] == [
        "unreadable row: 1 images for 2 texts",
        "placeholders: a text of the document has <image> of its own",
        "unreadable row: a piece is not exactly one of image and text",
    ]
    assert any("no picture of the document was fetched" in note for note in report.notes)


def test_two_urls_with_one_last_part_are_not_one_picture(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"images": [URL], "texts": [None]},
        {"images": ["https://other.org/cat.jpg"], "texts": [None]},
        {"images": ["https://a.b/c", URL], "texts": [None, None]},
    ]
    folder = _write_documents(tmp_path / "in", rows, "docs.jsonl")
    dataset, report = build("obelics", folder, names="last")
    assert [q.reason.split(" (")[0] for q in report.quarantined] == [
        f"ambiguous: cat.jpg may be the picture of {URL} or of https://other.org/cat.jpg"
    ]
    assert [set(parts) for parts, _ in read_all(dataset).values()] == [
        {"0.jpg"},
        {"0.jpg", "1.jpg"},
    ]
    (tmp_path / "obelics-out").rename(tmp_path / "before")
    (parts,) = (parts for parts, _ in read_all(build("obelics", folder)[0]).values())
    assert parts == {"0.jpg": picture(2)}  # the one whose file is named by the SHA-256 of its URL
    with pytest.raises(UsageError, match="names=url is neither hash nor last"):
        build("mmc4", folder, names="url")


def test_mmc4_documents(tmp_path: Path) -> None:
    info = [
        {"image_name": "cat.jpg", "raw_url": URL, "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "gone.jpg", "raw_url": "x", "matched_text_index": 0},
    ]
    rows: list[Any] = [
        {"text_list": ["One.", "Two."], "image_info": info, "url": "https://site.org"},
        {"text_list": ["One."], "image_info": info},
        {"text_list": "One."},
    ]
    folder = _write_documents(tmp_path / "in", rows, "docs_shard_0_v2.jsonl")
    dataset, report = build("mmc4", folder)
    ((parts, meta),) = read_all(dataset).values()
    assert (meta["txt"], set(parts)) == ("One.\n<image>\nTwo.", {"0.jpg"})
    assert meta["url"] == "https://site.org"
    assert len(report.quarantined) == 2
    (tmp_path / "again").mkdir()
    strict = folder.rename(tmp_path / "again" / "in")
    with pytest.raises(Exception, match=r"missing file: gone\.jpg"):
        build("mmc4", strict, missing="fail")


@pytest.mark.parametrize("source", ["finevision", "llava-onevision", "obelics", "mmc4"])
def test_a_picture_cut_short_costs_its_sample_alone(tmp_path: Path, source: str) -> None:
    """The second of two pictures, in each source of tables and documents."""
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    files = {"a.jpg": picture(0), "b.jpg": picture(1), "cut.jpg": picture(2)[:300]}
    rows: list[Any] = []
    for number, names in enumerate((["a.jpg", "b.jpg"], ["a.jpg", "cut.jpg"])):
        held = [{"bytes": files[name], "path": name} for name in names]
        info = [{"image_name": name, "matched_text_index": i} for i, name in enumerate(names)]
        rows.append(
            {
                "finevision": {
                    "images": held,
                    "texts": [{"user": "which", "assistant": "none"}],
                },
                "llava-onevision": {
                    "id": str(number),
                    "image": held,
                    "conversations": talk("<image> or <image>"),
                },
                "obelics": {
                    "images": [*(f"https://x.org/{name}" for name in names), None],
                    "texts": [None, None, "end"],
                },
                "mmc4": {"text_list": ["one", "two"], "image_info": info},
            }[source]
        )
    if source in ("obelics", "mmc4"):
        for name, data in files.items():
            (folder / "images" / name).write_bytes(data)
        (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_parquet(folder / "t.parquet", rows)
    options = {
        "finevision": {"several": "list"},
        "llava-onevision": {"several": "list"},
        "obelics": {"names": "last"},
        "mmc4": {},
    }
    dataset, report = build(source, folder, **options[source])
    (reason,) = (found.reason for found in report.quarantined)
    assert "unreadable image" in reason
    ((parts, meta),) = read_all(dataset).values()
    assert parts == {"0.jpg": files["a.jpg"], "1.jpg": files["b.jpg"]}
    assert meta["media"] == ["image", "image"]


def test_options_that_cannot_be_used(folder: Path) -> None:
    write_rows(folder, [{"conversations": talk("a")}])
    with pytest.raises(UsageError, match="depth is read from several files"):
        build("interleaved", folder, modality="image,depth")
    with pytest.raises(UsageError, match="missing=maybe"):
        build("mmc4", folder, missing="maybe")
    with pytest.raises(UsageError, match="rows=some is none of image, text, all"):
        build("llava665k", folder, rows="some")


def test_near_copies_are_not_looked_for_among_listed_media(folder: Path) -> None:
    """Samples without a picture would all look alike, and be left out."""
    write_rows(folder, [{"conversations": talk("hello")}, {"conversations": talk("bye")}])
    with pytest.raises(UsageError, match="dedup=perceptual, and samples of this dataset have any"):
        build("interleaved", folder, dedup="perceptual")


def test_a_caption_that_is_no_text_is_no_caption() -> None:
    meta = {"conversations": talk("hello"), "caption": 5, "media": []}
    settings = complete_options(get_source("obelics"), {}, name="d")[1]
    assert settings is not None
    raw = RawSample("k", "here", {}, meta=meta)
    made = prepare_sample(raw, ("image",), settings, lists_media=True)
    assert made.parts is not None and not made.reason


def test_rows_of_text_alone_may_be_listed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "t.parquet", [{"conversations": talk("hello")}])
    dataset, _ = build("parquet", tmp_path / "in", modality="text", several="list")
    ((parts, meta),) = read_all(dataset).values()
    assert not parts and meta["media"] == [] and dataset.modalities == ()
