"""Sources whose samples list their media: forms of instruction data, documents, broken rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from listed_rows import build, picture, read_all, sound, talk, write_parquet, write_rows

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.registry import complete_options, get_source
from onellm_dist.shards.sources.base import RawSample


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
    """With a modality as `interleaved`; without one, a row that has media is not a text alone."""
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
            "placeholders: its text has 2 <image> for 1 medium",
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
