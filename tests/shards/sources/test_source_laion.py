"""Sources laion400m and laion-coco: img2dataset's output, unfinished, cut short or mixed up."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from recipe_builds import build_recipe
from source_checks import build_source, decode_sample, get_reasons, make_photo, read_samples
from source_trees import write_download

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.registry import complete_options, get_source
from onellm_dist.shards.build.task import TooManyFailuresError
from onellm_dist.shards.sources.readers.img2dataset import choose_alt_text, read_tar_samples

RECIPES = Path(__file__).parents[3] / "shards"


def laion_rows(first: int, count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows as of LAION-400M's metadata after a download with --save_additional_columns."""
    return [
        {
            "url": f"https://example.org/{i}.jpg",
            "caption": f"alt text {i}",
            "SAMPLE_ID": 1000 + i,
            "LICENSE": "?",
            "NSFW": "UNLIKELY",
            "similarity": 0.3 + i / 100,
            "sha256": f"{i:064x}",
            "exif": "{}",
            "original_width": 640,
            "original_height": 480,
            "width": 64,
            "height": 48,
            "media": make_photo(seed=i),
            **more,
        }
        for i in range(first, first + count)
    ]


FAILED = {
    "url": "https://example.org/gone.jpg",
    "caption": "gone",
    "status": "failed_to_download",
    "error_message": "HTTP 404",
    "media": None,
}


def laion(root: Path) -> Path:
    """Two finished shards; downloads that failed stand in the parquet alone."""
    first = laion_rows(0, 3)
    write_download(
        root, 0, [first[0], FAILED, *first[1:], {**FAILED, "status": "failed_to_resize"}]
    )
    write_download(root, 1, laion_rows(3, 2))
    return root


def places_in(tar: Path) -> dict[str, int]:
    """Member to the offset of its content."""
    with tarfile.open(tar) as archive:
        return {m.name: m.offset_data for m in archive}


def test_laion_400m_comes_through_field_by_field(tmp_path: Path) -> None:
    report, dataset = build_source("laion400m", laion(tmp_path / "in"), tmp_path / "out")
    found = read_samples(dataset)
    assert list(found) == ["0000000", "0000002", "0000003", "0000100", "0000101"]
    assert found["0000002"]["jpg"] == make_photo(seed=1)
    assert found["0000002"]["txt"] == "alt text 1"
    expected = {k: v for k, v in laion_rows(1, 1)[0].items() if k != "media"}
    assert found["0000002"]["json"] == {**expected, "key": "0000002", "status": "success"}
    assert dataset.modalities == ("image",)
    assert "CC-BY" in dataset.manifest.licence
    statistics = json.loads((tmp_path / "out/statistics.json").read_text())
    assert (statistics["raw_samples"], statistics["left_out"]) == (
        7,
        {"failed_to_download": 1, "failed_to_resize": 1},
    )
    assert not report.quarantined
    assert decode_sample(dataset, "0000101")["image"].std() > 0.1


def test_without_parquet_the_json_in_the_tar_says_the_same(tmp_path: Path) -> None:
    _, listed = build_source("laion400m", laion(tmp_path / "in"), tmp_path / "listed")
    for table in (tmp_path / "in").glob("*.parquet"):
        table.unlink()
    _, dataset = build_source("laion400m", tmp_path / "in", tmp_path / "out")
    before, after = read_samples(listed), read_samples(dataset)
    assert before.keys() == after.keys()
    for key, sample in before.items():
        assert sample["jpg"] == after[key]["jpg"]
        assert sample["txt"] == after[key]["txt"]
        assert sample["json"] == after[key]["json"]


def test_a_caption_may_be_in_laions_own_column_or_in_the_tar_alone(tmp_path: Path) -> None:
    rows = laion_rows(0, 2)
    named = [
        {**{k: v for k, v in r.items() if k != "caption"}, "TEXT": f"named {i}"}
        for i, r in enumerate(rows)
    ]
    write_download(tmp_path / "named", 0, named, captions=False)
    _, dataset = build_source("laion400m", tmp_path / "named", tmp_path / "a")
    assert [s["txt"] for s in read_samples(dataset).values()] == ["named 0", "named 1"]
    write_download(
        tmp_path / "none",
        0,
        [{**n, "TEXT": None, "media": make_photo(seed=9)} for n in named[:1]] + named[1:],
        captions=False,
    )
    report, _ = build_source("laion400m", tmp_path / "none", tmp_path / "b", max_failures=0.5)
    assert get_reasons(report) == {"0000000": "no caption: neither the metadata nor a .txt has one"}


def test_keys_of_several_download_runs_do_not_clash(tmp_path: Path) -> None:
    for run in ("part1", "part0"):
        write_download(tmp_path / "in" / run, 0, laion_rows(0, 1))
    _, dataset = build_source("laion400m", tmp_path / "in", tmp_path / "out")
    assert list(read_samples(dataset)) == ["part0/0000000", "part1/0000000"]


def test_unfinished_tars_are_named_and_refused_unless_asked_for(tmp_path: Path) -> None:
    laion(tmp_path / "in")
    cut = write_download(tmp_path / "in", 2, laion_rows(5, 3), finished=False)
    cut.write_bytes(cut.read_bytes()[: places_in(cut)["0000202.jpg"] + 50])
    (tmp_path / "in/00002.parquet").write_bytes(b"PAR1")  # its footer is written last
    with pytest.raises(
        UsageError, match=r"1 of 3 tars is unfinished \(no _stats.json\): 00002.tar"
    ):
        build_dataset("laion400m", tmp_path / "in", tmp_path / "out")
    report, dataset = build_source(
        "laion400m", tmp_path / "in", tmp_path / "skipped", unfinished="skip"
    )
    assert dataset.samples() == 5
    assert "unfinished tars (left out): 00002.tar" in report.notes
    report, dataset = build_source(
        "laion400m", tmp_path / "in", tmp_path / "taken", unfinished="take", max_failures=0.5
    )
    assert {"0000200", "0000201"} <= read_samples(dataset).keys()
    assert "0000202" not in read_samples(dataset)
    assert any(r.startswith("truncated tar: 00002.tar") for r in get_reasons(report).values())
    with pytest.raises(UsageError, match="unfinished=some is none of"):
        build_dataset(
            "laion400m", tmp_path / "in", tmp_path / "out", options={"unfinished": "some"}
        )


def test_a_finished_tar_that_was_cut_in_a_copy_loses_what_is_gone_and_no_more(
    tmp_path: Path,
) -> None:
    tar = write_download(tmp_path / "in", 0, laion_rows(0, 5))
    tar.write_bytes(tar.read_bytes()[: places_in(tar)["0000003.jpg"] + 100])
    report, dataset = build_source("laion400m", tmp_path / "in", tmp_path / "out", max_failures=0.5)
    assert list(read_samples(dataset)) == ["0000000", "0000001", "0000002"]
    found = get_reasons(report)
    assert found["0000003"].startswith("truncated file: 00000.tar has 100 of")
    assert found["0000004"].startswith("truncated tar: 00000.tar cannot be read to its end")
    with pytest.raises(TooManyFailuresError, match="bad samples: 1 of the first 4"):
        build_dataset("laion400m", tmp_path / "in", tmp_path / "other")


@pytest.mark.parametrize("listed", [True, False], ids=["parquet", "alone"])
@pytest.mark.seconds
def test_a_tar_that_was_cut_anywhere_gives_the_samples_before_the_cut_and_names_the_fault(
    tmp_path: Path, listed: bool
) -> None:
    """Cuts at random bytes and around every header and every content's end."""
    tar = write_download(tmp_path / "in", 0, laion_rows(0, 4))
    data, places = tar.read_bytes(), places_in(tar)
    with tarfile.open(tar) as archive:
        ends = {m.name: m.offset_data + m.size for m in archive}
    description = {"tar": "00000.tar", "parquet": "00000.parquet" if listed else None}
    _, settings = complete_options(get_source("laion400m"), {}, name="cut")
    assert settings is not None
    draw = random.Random(0)
    cuts = {
        p + d
        for p in (*places.values(), *(p - 512 for p in places.values()), *ends.values())
        for d in (-1, 0, 1)
    }
    for cut in sorted(
        {c for c in cuts if 0 <= c <= max(ends.values())}
        | {draw.randrange(len(data)) for _ in range(20)}
    ):
        tar.write_bytes(data[:cut])
        found = list(read_tar_samples(tmp_path / "in", description, ("jpg",), choose_alt_text))
        outcomes = [prepare_sample(c, ("image",), settings) for c in found]
        needed = (
            "jpg" if listed else "json"
        )  # the parquet has the caption and the metadata; without it the tar's .json
        whole = [key for key in (f"000000{i}" for i in range(4)) if ends[f"{key}.{needed}"] <= cut]
        assert [o.key for o in outcomes if o.parts is not None] == whole, cut
        assert all(o.reason for o in outcomes if o.parts is None)
        if listed:
            assert len(found) == 4
        elif cut <= max(ends.values()):
            assert any("truncated" in o.reason for o in outcomes)


def test_bad_samples_leave_the_others_alone(tmp_path: Path) -> None:
    rows = laion_rows(0, 8)
    rows[1]["media"] = b"no picture"
    rows[2]["caption"] = "  "
    rows[3]["media"] = make_photo(seed=3)[:200]
    tar = write_download(tmp_path / "in", 0, rows)
    members = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            source = archive.extractfile(member)
            assert source is not None
            members[member.name] = source.read()
    with open(tar, "wb") as file:  # a sample that is lost and one without its picture
        writer = webdataset.TarWriter(file)
        for key in ("0000000", "0000001", "0000002", "0000003", "0000005", "0000006", "0000007"):
            parts = {
                e: members[f"{key}.{e}"]
                for e in ("jpg", "txt", "json")
                if (key, e) != ("0000005", "jpg")
            }
            writer.write({"__key__": key, **parts})
        writer.close()
    report, dataset = build_source("laion400m", tmp_path / "in", tmp_path / "out", max_failures=0.7)
    assert list(read_samples(dataset)) == ["0000000", "0000006", "0000007"]
    found = get_reasons(report)
    assert found["0000001"].startswith("unreadable image")
    assert found["0000002"] == "empty caption"
    assert found["0000003"].startswith("unreadable image")
    assert found["0000004"] == "missing sample: the parquet lists it, the tar does not have it"
    assert found["0000005"].startswith("missing part: none of .jpg")


def test_a_tar_beside_another_runs_parquet_is_refused(tmp_path: Path) -> None:
    write_download(tmp_path / "other", 0, laion_rows(0, 1))
    write_download(tmp_path / "in", 0, laion_rows(0, 3))
    (tmp_path / "other/00000.parquet").replace(tmp_path / "in/00000.parquet")
    with pytest.raises(OneLLMError, match=r"holds 2 samples that 00000\.parquet does not list"):
        build_dataset("laion400m", tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/00000.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(OneLLMError, match=r"00000\.parquet: "):
        build_dataset("laion400m", tmp_path / "in", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no tar"):
        build_dataset("laion400m", tmp_path / "empty", tmp_path / "out")


def coco(root: Path) -> Path:
    """LAION-COCO with its columns kept; `.txt` is the alt text."""
    rows = [
        {
            **row,
            "top_caption": f"top {i}",
            "all_captions": [f"top {i}", f"second {i}", f"third {i}"],
            "all_similarities": [0.3, 0.2, 0.1],
            "hash": 2**62 + i,
            "punsafe": [0.01, 0.5, 0.02, None][i],
            "pwatermark": [0.1, 0.1, 0.9, 0.1][i],
        }
        for i, row in enumerate(laion_rows(0, 4))
    ]
    write_download(root, 0, rows)
    return root


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("top", {f"000000{i}": f"top {i}" for i in range(4)}),
        ("alt", {f"000000{i}": f"alt text {i}" for i in range(4)}),
        ("all", {f"000000{i}": [f"top {i}", f"second {i}", f"third {i}"] for i in range(4)}),
    ],
)
def test_laion_coco_has_three_kinds_of_captions(
    tmp_path: Path, caption: str, expected: dict[str, Any]
) -> None:
    _, dataset = build_source(
        "laion-coco", coco(tmp_path / "in"), tmp_path / "out", caption=caption
    )
    found = read_samples(dataset)
    assert {k: s.get("txt", s["json"]["caption"]) for k, s in found.items()} == expected
    assert all(
        s["json"].get("alt_text", s["json"]["caption"]) == f"alt text {k[-1]}"
        for k, s in found.items()
    )
    meta = next(iter(found.values()))["json"]
    assert (meta["all_captions"], meta["hash"], meta["punsafe"]) == (
        ["top 0", "second 0", "third 0"],
        2**62,
        0.01,
    )
    assert dataset.manifest.attributes["caption"] == caption


def test_the_thresholds_of_laion_coco(tmp_path: Path) -> None:
    coco(tmp_path / "in")
    _, dataset = build_source("laion-coco", tmp_path / "in", tmp_path / "a", max_punsafe=0.1)
    assert list(read_samples(dataset)) == ["0000000", "0000002"]
    statistics = json.loads((tmp_path / "a/statistics.json").read_text())
    assert statistics["left_out"] == {"punsafe: above 0.1": 1, "punsafe: not known": 1}
    _, dataset = build_source(
        "laion-coco", tmp_path / "in", tmp_path / "b", max_punsafe=0.1, max_pwatermark=0.8
    )
    assert list(read_samples(dataset)) == ["0000000"]
    _, dataset = build_source(
        "laion-coco", tmp_path / "in", tmp_path / "c", min_similarity=0.315, nsfw="UNLIKELY"
    )
    assert list(read_samples(dataset)) == ["0000002", "0000003"]


def test_a_download_without_the_synthetic_captions_says_so(tmp_path: Path) -> None:
    laion(tmp_path / "in")
    with pytest.raises(TooManyFailuresError, match="no caption: the metadata has no top_caption"):
        build_dataset("laion-coco", tmp_path / "in", tmp_path / "out")
    with pytest.raises(UsageError, match="caption=best is none of"):
        build_dataset("laion-coco", tmp_path / "in", tmp_path / "out", options={"caption": "best"})


@pytest.mark.parametrize("name", ["laion400m", "laion_coco"])
def test_the_recipes_build(tmp_path: Path, name: str) -> None:
    tree = (laion if name == "laion400m" else coco)(tmp_path / "in")
    _, report = build_recipe(
        RECIPES / f"{name}.yaml", inputs=str(tree), out=str(tmp_path / "out"), workers=1
    )
    assert report.samples == (5 if name == "laion400m" else 1)
