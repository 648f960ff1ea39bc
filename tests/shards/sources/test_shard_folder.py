"""`onellm shards build folder`: side files, modalities, bad input, options and recipes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import webdataset
from folder_builds import FINE, build
from recipe_builds import build_recipe
from shard_worlds import all_bytes, array, contents, picture, sound, write_tree

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import all_modalities
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.build_dataset import format_summary
from onellm_dist.shards.build.task import TooManyFailuresError
from onellm_dist.shards.command import build_command
from onellm_dist.shards.sources.base import BuildReport
from onellm_dist.shards.sources.toyworld.render import render_sample

TALK = '{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}'


def reasons(report: BuildReport) -> dict[str, str]:
    return {q.key: q.reason for q in report.quarantined}


def test_media_with_side_captions(tmp_path: Path) -> None:
    """Dotted names, upper-case extensions, byte order marks, white space, folders, hidden files."""
    files: dict[str, bytes | str] = {
        "cats/10.v2.JPG": picture(0),
        "cats/10.v2.txt": b"\xef\xbb\xbf  gr\xc3\xbcn\n",
        "cats/2.png": picture(1, "PNG"),
        "cats/2.json": '{"caption": "two"}',
        "a.jpeg": picture(2),
        "a.txt": "an a",
        "a.json": TALK,
        ".hidden/x.jpg": b"",
        ".DS_Store": b"",
        "notes.md": b"",
    }
    report, dataset = build(tmp_path, files)
    notes = ("ignored: 1 x .md", "hidden files and folders skipped: 2")
    assert (report.samples, report.quarantined, report.notes) == (3, (), notes)
    assert contents(dataset) == {
        "a": {"jpeg": files["a.jpeg"], "txt": b"an a", "json": TALK.encode()},
        "cats/10_v2": {"jpg": files["cats/10.v2.JPG"], "txt": "grün".encode()},
        "cats/2": {"png": files["cats/2.png"], "json": b'{"caption": "two"}'},
    }
    assert list(contents(dataset)) == ["a", "cats/10_v2", "cats/2"]
    assert (dataset.name, dataset.modalities, dataset.manifest.source) == (
        "out",
        ("image",),
        "folder",
    )
    urls = [str(dataset.tar_path(s)) for s in dataset.shards()]
    assert [s["__key__"] for s in webdataset.WebDataset(urls, shardshuffle=False)] == [
        "a",
        "cats/10_v2",
        "cats/2",
    ]
    assert sorted(all_bytes(tmp_path / "out")) == [
        *(
            f".nv-meta/{name}"
            for name in (".info.json", "dataset.yaml", "index.sqlite", "index.uuid", "split.yaml")
        ),
        "manifest.json",
        *(f"shards/train-000000.tar{end}" for end in ("", ".idx", ".index")),
        "statistics.json",
    ]


@pytest.mark.parametrize(
    ("files", "modality", "parts"),
    [
        ({"a.wav": sound(0)}, ("audio",), {"wav"}),
        ({"a.jpg": picture(0), "a.depth.png": picture(1, "PNG")}, ("depth",), {"jpg", "depth.png"}),
        (
            {"a.png": picture(0, "PNG"), "a.normal.npy": array((24, 32, 3))},
            ("normal",),
            {"png", "normal.npy"},
        ),
        ({"a.point.npy": array((9000, 6))}, ("point",), {"point.npy"}),
        ({"a.imu.npy": array((6, 400))}, ("imu",), {"imu.npy"}),
        ({"a.nsdgeneral.npy": array((3, 15724))}, ("fmri",), {"nsdgeneral.npy"}),
    ],
)
def test_the_modality_is_inferred_from_the_extensions(
    tmp_path: Path, files: dict[str, bytes], modality: tuple[str, ...], parts: set[str]
) -> None:
    report, dataset = build(tmp_path, {**files, "a.txt": "x"})
    assert reasons(report) == {}
    assert dataset.modalities == modality
    assert set(contents(dataset)["a"]) == parts | {"txt"}


def test_samples_of_two_modalities(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.jpg": picture(0),
        "a.wav": sound(0),
        "a.txt": "x",
        "b.jpg": picture(1),
        "b.wav": sound(1),
        "b.txt": "y",
        "c.jpg": picture(2),
        "c.txt": "z",
    }
    report, dataset = build(tmp_path, files, modality="image,audio", max_failures="0.5")
    assert dataset.modalities == ("image", "audio")
    assert {k: set(v) for k, v in contents(dataset).items()} == {
        k: {"jpg", "wav", "txt"} for k in "ab"
    }
    assert reasons(report)["c"].startswith("missing part: no audio part")


def test_text_alone(tmp_path: Path) -> None:
    talk = '{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}'
    _, dataset = build(
        tmp_path,
        {"a.txt": "one", "b.json": talk},
        modality="text",
    )
    assert dataset.modalities == ()
    assert list(contents(dataset)) == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.npy": array((6, 400)), "a.txt": "x"}, "1 of point or imu or fmri"),
        (
            {"a.jpg": picture(0), "a.txt": "x", "b.wav": sound(0), "b.txt": "y"},
            "1 of image; 1 of audio",
        ),
        ({"a.jpg": picture(0), "a.wav": sound(0), "a.txt": "x"}, "1 of image or audio"),
        ({"a.doc": b"", "b.txt": "x"}, "no file there is media of a known modality"),
        ({"a.depth.png": picture(0, "PNG"), "a.txt": "x"}, r"only \.depth\.png"),
    ],
)
def test_an_ambiguous_modality_must_be_named(
    tmp_path: Path, files: Mapping[str, bytes | str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(tmp_path, files)
    assert os.listdir(tmp_path) == ["in"]


BAD: dict[str, bytes | str] = {
    "corrupt.jpg": picture(0)[:200],
    "corrupt.txt": "x",
    "no_image.jpg": b"<html>404</html>",
    "no_image.txt": "x",
    "latin.jpg": picture(1),
    "latin.txt": b"caf\xe9",
    "empty.jpg": picture(2),
    "empty.txt": " \n",
    "silent.jpg": picture(3),
    "lonely.txt": "caption of nothing",
    "twice.jpg": picture(4),
    "twice.png": picture(5, "PNG"),
    "twice.txt": "x",
    "json.jpg": picture(6),
    "json.json": "{broken",
    "turns.jpg": picture(7),
    "turns.json": '{"conversations": [{"role": "user"}]}',
    "nothing.jpg": picture(8),
    "nothing.json": '{"id": 3}',
    "same.jpg": picture(9),
    "same.JPG": picture(9),
    "same.txt": "x",
    "__odd__.jpg": picture(9),
    "__odd__.txt": "x",
}
REASONS = {
    "corrupt": "unreadable image: ",
    "no_image": "unreadable image: ",
    "latin": "caption is not UTF-8: latin.txt: byte 0xe9 at position 3",
    "empty": "empty caption: empty.txt",
    "silent": "no caption: neither silent.txt nor silent.json",
    "lonely": "caption without media",
    "twice": "ambiguous: twice.jpg and twice.png may each be the image file",
    "json": "unreadable .json: ",
    "turns": "malformed conversations: ",
    "nothing": "no caption: neither a caption nor a conversation",
    "same": "ambiguous: same.",
    "__odd__": "dataset out, key '__odd__': a WebDataset tar cannot hold this key",
}


def test_every_bad_sample_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """Nothing replaces a bad sample: exactly the good ones are stored."""
    good: dict[str, bytes | str] = {
        f"good{i}{e}": d
        for i in range(3)
        for e, d in ((".jpg", picture(20 + i)), (".txt", f"good {i}"))
    }
    report, dataset = build(tmp_path, {**BAD, **good}, max_failures=0.9)
    assert list(contents(dataset)) == ["good0", "good1", "good2"]
    found = reasons(report)
    assert set(found) == set(REASONS)
    for key, start in REASONS.items():
        assert found[key].startswith(start), (key, found[key])
    lines = [
        json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    ]
    assert {line["key"]: line["reason"] for line in lines} == found
    assert next(line["file"] for line in lines if line["key"] == "corrupt").endswith(
        "in/corrupt.jpg"
    )
    text = format_summary(report, tmp_path / "out")
    assert f"left out: {len(REASONS)}" in text
    assert "2 x unreadable image" in text


def test_too_many_failures_build_nothing(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        f"{i:02d}{e}": d for i in range(20) for e, d in ((".jpg", picture(i)), (".txt", "x"))
    }
    for i in (3, 7, 11):
        files[f"{i:02d}.jpg"] = b"broken"
    with pytest.raises(
        TooManyFailuresError,
        match=r"bad samples: 3 of the first 12; max_failures=0.1 allows 2 of all 20"
        r"(.|\n)*03\.jpg: unreadable image",
    ) as caught:
        build(tmp_path, files)
    assert caught.value.exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["in", "out.quarantine.jsonl"]
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 3
    report, dataset = build(tmp_path, files, max_failures=0.15)
    assert (report.samples, dataset.samples()) == (17, 17)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_all_bad_builds_nothing_whatever_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(TooManyFailuresError, match="bad samples: 1 of the first 1;"):
        build(tmp_path, {"a.jpg": b"broken", "a.txt": "x"}, max_failures=1)
    assert not (tmp_path / "out").exists()


def test_without_the_check_media_are_stored_unread(tmp_path: Path) -> None:
    report, dataset = build(tmp_path, {"a.jpg": b"broken", "a.txt": "x"}, check="no")
    assert (report.samples, contents(dataset)["a"]["jpg"]) == (1, b"broken")


def test_media_that_decodes_but_does_not_fit_the_model_is_bad(tmp_path: Path) -> None:
    """The check transforms, too: a voxel vector of the wrong length decodes as an array."""
    files: dict[str, bytes | str] = {
        "a.fmri.npy": array((15724,)),
        "a.txt": "x",
        "b.fmri.npy": array((100,)),
        "b.txt": "y",
    }
    report, dataset = build(tmp_path, files, max_failures=0.5)
    assert list(contents(dataset)) == ["a"]
    assert reasons(report)["b"].startswith("unreadable fmri: ")


@pytest.mark.seconds
def test_shards_are_cut_and_shuffled_as_asked(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{i:02d}.txt": f"text {i}" for i in range(20)}
    options: dict[str, Any] = {
        "modality": "text",
        "max_samples": "8",
        "split": "val",
        "name": "mine",
        "licence": "CC0-1.0",
    }
    _, dataset = build(tmp_path, files, **options)
    assert [s.samples for s in dataset.shards("val")] == [8, 8, 4]
    assert (dataset.name, dataset.manifest.licence) == ("mine", "CC0-1.0")
    keys = sorted(contents(dataset, "val"))
    orders = [
        list(
            contents(
                build(tmp_path, {}, overwrite=True, shuffle="yes", seed=seed, **options)[1], "val"
            )
        )
        for seed in (1, 1, 2)
    ]
    assert sorted(orders[0]) == keys
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("foldr", "in", "out"), "did you mean 'folder'"),
        (("folder", "nowhere", "out"), "no such file or folder"),
        (("folder", None, "out"), "needs an input"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, str | None, str], message: str) -> None:
    write_tree(tmp_path / "in", FINE)
    source, inputs, out = arguments
    with pytest.raises(UsageError, match=message):
        build_dataset(source, tmp_path / inputs if inputs else None, tmp_path / out)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modlity": "image"}, "did you mean 'modality'"),
        ({"modality": "smell"}, "unknown modality 'smell'"),
        ({"modality": "image,image"}, "twice"),
        (
            {"modality": "audio"},
            r"no samples of modality audio found \(ignored: 1 x \.jpg, 1 x \.txt\)",
        ),
        ({"max_failures": 2}, "not between 0 and 1"),
        ({"max_samples": "many"}, "not of type int"),
        ({"max_samples": 0}, "at least 1"),
        ({"check": "maybe"}, "not of type bool"),
        ({"captions": "none.csv"}, "no such table"),
        ({"workers": 0}, "below 1"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(tmp_path, FINE, **options)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.seconds
def test_the_command_and_a_recipe_build_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "in", FINE)
    monkeypatch.chdir(tmp_path)
    assert (
        build_command(
            "folder",
            [Path("in"), Path("out")],
            ["name=x", "licence=CC0-1.0"],
            workers=1,
            seed=0,
            overwrite=False,
        )
        == 0
    )
    assert "out: 1 sample" in capsys.readouterr().out
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "source: folder\ninputs: in\nout: elsewhere\noptions: {name: x, licence: unknown}\n"
    )
    assert build_recipe(recipe, licence="CC0-1.0")[0] == Path("elsewhere")
    assert (
        build_command(
            str(recipe), [Path("third")], ["licence=CC0-1.0"], workers=1, seed=0, overwrite=False
        )
        == 0
    )
    assert (
        all_bytes(tmp_path / "out")
        == all_bytes(tmp_path / "elsewhere")
        == all_bytes(tmp_path / "third")
    )
    assert build_command("folder", [Path("x")], ["help"], workers=1, seed=0, overwrite=False) == 0
    assert "--max-failures" in capsys.readouterr().out
    with pytest.raises(UsageError, match="takes IN and OUT"):
        build_command("folder", [Path("out")], [], workers=1, seed=0, overwrite=False)
    assert (
        build_command(
            str(recipe),
            [Path("in"), Path("fourth")],
            ["licence=CC0-1.0"],
            workers=1,
            seed=5,
            overwrite=False,
        )
        == 0
    )
    assert all_bytes(tmp_path / "fourth") == all_bytes(tmp_path / "out")
    recipe.write_text("source: folder\noutput: x\n")
    with pytest.raises(UsageError, match="unknown key 'output', no key 'out'"):
        build_recipe(recipe)


@pytest.mark.parametrize("name", list(all_modalities()))
@pytest.mark.seconds
def test_real_media_of_every_modality_come_through_unchanged(tmp_path: Path, name: str) -> None:
    """A toy sample as loose files: decoded and transformed as a check, stored byte by byte."""
    sample = render_sample(name, "train", 0, 0)
    report, dataset = build(
        tmp_path,
        {f"{name}.{extension}": data for extension, data in sample.parts.items()},
        modality=name,
    )
    assert reasons(report) == {}
    assert contents(dataset)[name] == sample.parts
