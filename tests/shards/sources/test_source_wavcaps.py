"""wavcaps: JSON by source with unpacked FLAC or split zips that are read in place."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recipe_builds import build_recipe
from shard_worlds import write_tree
from source_checks import build_source, decode_sample, get_reasons, make_tone, read_samples

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.task import TooManyFailuresError

RECIPE = Path(__file__).parents[3] / "shards/wavcaps.yaml"
INSIDE = "mnt/fast/nobackup/WavCaps/data/waveforms"
"""The archives keep the authors' own path."""

ROWS: Mapping[str, list[dict[str, object]]] = {
    "AudioSet_SL": [
        {
            "id": "Y-Cnb8VtcTXg.wav",
            "caption": "A crowd cheers.",
            "audio": "wav_path",
            "duration": 10.0,
        }
    ],
    "BBC_Sound_Effects": [
        {
            "id": "07040138",
            "caption": "A steam engine.",
            "category": "Trains",
            "description": "Steam train, 1930",
            "duration": 115.2,
            "download_link": "https://sound-effects.bbcrewind.co.uk/07040138",
            "audio": "wav_path",
        },
    ],
    "FreeSound": [
        {
            "id": "180913",
            "file_name": "rain.wav",
            "href": "/people/a/sounds/180913/",
            "tags": ["rain", "roof"],
            "author": "a",
            "description": "rain on a roof",
            "duration": 1.0,
            "download_link": "https://freesound.org/s/180913/",
            "caption": "Rain falls on a roof.",
        },
        {
            "id": "2219",
            "file_name": "x.aif",
            "href": "/people/b/sounds/2219/",
            "tags": [],
            "author": "b",
            "description": "",
            "duration": 3.0,
            "download_link": "https://freesound.org/s/2219/",
            "caption": "A bell rings twice.",
        },
    ],
    "SoundBible": [
        {
            "id": "2219",
            "title": "Airplane Landing",
            "description": "Large airplane",
            "author": "D",
            "href": "2219-A.html",
            "caption": "An airplane is landing.",
            "duration": 14.1,
            "audio": "wav_path",
            "download_link": "https://soundbible.com/2219",
        },
    ],
}
FILES = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}


def noise(name: str) -> bytes:
    """A second of noise: 60 kB that zip cannot shrink, so that a member spans volumes."""
    wave = np.random.default_rng(sum(name.encode())).normal(0, 0.2, 32000)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 32000, format="FLAC")
    return buffer.getvalue()


def table(rows: Sequence[object]) -> str:
    return json.dumps({"num_captions_per_audio": 1, "data": rows})


def write_annotations(root: Path) -> Path:
    files: dict[str, bytes | str] = {
        f"json_files/{s}/{FILES[s]}": table(rows) for s, rows in ROWS.items()
    }
    files["json_files/FreeSound/fsd_final_2s.json"] = table(ROWS["FreeSound"][1:])
    listed = {"AudioSet": ["Y-Cnb8VtcTXg.wav"], "FreeSound": ["2219"]}
    files["json_files/blacklist/blacklist_exclude_all_ac.json"] = json.dumps(listed)
    return write_tree(root, files)


def sounds(source: str) -> dict[str, bytes]:
    stems = [str(r["id"]).removesuffix(".wav") for r in ROWS[source]]
    return {f"{s}.flac": noise(source + s) for s in stems}


def unpacked(root: Path) -> Path:
    write_annotations(root)
    for source in ROWS:
        write_tree(root / "Zip_files" / f"{source}_flac", sounds(source))
    return root


def zipped(folder: Path, source: str, files: Mapping[str, bytes], size: str | None = "64k") -> None:
    """Zip_files/SOURCE/SOURCE.z01 ... SOURCE.zip, by Info-ZIP as the authors made them."""
    tree = write_tree(
        folder.parent / "waveforms", {f"{INSIDE}/{source}_flac/{n}": d for n, d in files.items()}
    )
    folder.mkdir(parents=True)
    subprocess.run(
        ["zip", "-q", "-r", *(["-s", size] if size else []), str(folder / f"{source}.zip"), "mnt"],
        cwd=tree,
        check=True,
    )
    shutil.rmtree(tree)


def archives(root: Path) -> Path:
    write_annotations(root)
    for source in ROWS:
        zipped(root / "Zip_files" / source, source, sounds(source))
    return root


needs_zip = pytest.mark.skipif(
    shutil.which("zip") is None, reason="Info-ZIP's zip makes the split archives"
)


def check(out: Path, inputs: Path) -> None:
    _, dataset = build_source("wavcaps", inputs, out)
    found = read_samples(dataset)
    assert list(found) == [
        "AudioSet_SL/Y-Cnb8VtcTXg",
        "BBC_Sound_Effects/07040138",
        "FreeSound/180913",
        "FreeSound/2219",
        "SoundBible/2219",
    ]
    for source, rows in ROWS.items():
        for row in rows:
            stem = str(row["id"]).removesuffix(".wav")
            sample = found[f"{source}/{stem}"]
            assert sample["flac"] == sounds(source)[f"{stem}.flac"]
            assert sample["txt"] == row["caption"]
            assert sample["json"] == {**row, "source": source}
    assert decode_sample(dataset, "SoundBible/2219")["audio"].std() > 0.1


def test_unpacked_files_come_through_field_by_field(tmp_path: Path) -> None:
    check(tmp_path / "out", unpacked(tmp_path / "in"))


@needs_zip
def test_split_archives_are_read_where_they_lie(tmp_path: Path) -> None:
    archives(tmp_path / "in")
    assert [p.name for p in sorted((tmp_path / "in/Zip_files/FreeSound").iterdir())] == [
        "FreeSound.z01",
        "FreeSound.zip",
    ]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "in").rglob("*")}
    check(tmp_path / "out", tmp_path / "in")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "in").rglob("*")} == before


@needs_zip
def test_an_archive_of_one_volume_and_unpacked_files_together(tmp_path: Path) -> None:
    write_annotations(tmp_path / "in")
    for source in ROWS:
        if source == "SoundBible":
            write_tree(tmp_path / "in/SoundBible_flac", sounds(source))
        else:
            zipped(tmp_path / "in/Zip_files" / source, source, sounds(source), None)
    check(tmp_path / "out", tmp_path / "in")


def test_the_blacklist_is_left_out_and_its_absence_is_noted(tmp_path: Path) -> None:
    unpacked(tmp_path / "in")
    listed = "json_files/blacklist/blacklist_exclude_all_ac.json"
    report, dataset = build_source("wavcaps", tmp_path / "in", tmp_path / "out", blacklist=listed)
    assert list(read_samples(dataset)) == [
        "BBC_Sound_Effects/07040138",
        "FreeSound/180913",
        "SoundBible/2219",
    ]  # SoundBible's 2219 is not FreeSound's
    assert "left out knowingly: 2 x blacklist" in report.notes
    report, _ = build_source("wavcaps", tmp_path / "in", tmp_path / "all")
    assert any(n.startswith("no blacklist: clips of AudioCaps'") for n in report.notes)
    with pytest.raises(UsageError, match=r"none.json"):
        build_dataset(
            "wavcaps",
            tmp_path / "in",
            tmp_path / "x",
            options={"blacklist": "json_files/blacklist/none.json"},
        )


def test_audiosets_ids_are_found_with_and_without_their_y(tmp_path: Path) -> None:
    unpacked(tmp_path / "in")
    folder = tmp_path / "in/Zip_files/AudioSet_SL_flac"
    (folder / "Y-Cnb8VtcTXg.flac").rename(folder / "-Cnb8VtcTXg.flac")
    _, dataset = build_source("wavcaps", tmp_path / "in", tmp_path / "out", sources="AudioSet_SL")
    assert read_samples(dataset)["AudioSet_SL/Y-Cnb8VtcTXg"]["txt"] == "A crowd cheers."


def test_bad_rows_and_sounds_are_left_out_one_by_one(tmp_path: Path) -> None:
    unpacked(tmp_path / "in")
    rows = [
        *ROWS["FreeSound"],
        {"caption": "no id"},
        {"id": "3", "caption": ""},
        {"id": "4"},
        {"id": "5", "caption": "gone"},
        "no object",
        {"id": "6", "caption": "cut short"},
        {"id": "2219", "caption": "the same again"},
        {"id": "7", "caption": "no sound"},
    ]
    folder = (
        write_tree(tmp_path / "in", {"json_files/FreeSound/fsd_final.json": table(rows)})
        / "Zip_files/FreeSound_flac"
    )
    write_tree(
        folder,
        {
            "3.flac": make_tone(),
            "4.flac": make_tone(),
            "6.flac": make_tone()[:2000],
            "7.flac": b"ID3 text",
        },
    )
    report, dataset = build_source(
        "wavcaps", tmp_path / "in", tmp_path / "out", sources="FreeSound", max_failures=0.9
    )
    assert list(read_samples(dataset)) == ["FreeSound/180913", "FreeSound/2219"]
    found = {
        q.file.removeprefix("json_files/FreeSound/fsd_final.json"): q.reason
        for q in report.quarantined
    }
    assert found["[2]"] == found["[6]"] == "unreadable row: no id"
    assert found["[3]"] == "empty caption"
    assert found["[4]"] == "no caption: the row has none"
    assert found["[5]"] == "missing file: 5.flac is in no folder and no archive of FreeSound"
    assert found["[7]"].startswith("unreadable audio")
    assert found["[8]"].startswith("duplicate key")
    assert found["[9]"].startswith("unreadable audio")
    with pytest.raises(TooManyFailuresError):
        build_dataset(
            "wavcaps", tmp_path / "in", tmp_path / "other", options={"sources": "FreeSound"}
        )
    _, dataset = build_source(
        "wavcaps",
        tmp_path / "in",
        tmp_path / "part",
        sources="FreeSound",
        max_failures=0.9,
        missing="skip",
    )
    assert json.loads((tmp_path / "part/statistics.json").read_text())["left_out"] == {
        "media was not fetched": 1
    }


def test_a_json_that_is_cut_short_is_an_error_that_names_its_place(tmp_path: Path) -> None:
    unpacked(tmp_path / "in")
    path = tmp_path / "in/json_files/FreeSound/fsd_final.json"
    path.write_text(path.read_text()[:-120])
    with pytest.raises(
        Exception, match=r"fsd_final.json: at byte \d+: .*\nthe rows after this place"
    ):
        build_dataset("wavcaps", tmp_path / "in", tmp_path / "out")
    path.write_text('{"rows": []}')
    with pytest.raises(UsageError, match=r"fsd_final.json has no key 'data'"):
        build_dataset("wavcaps", tmp_path / "in", tmp_path / "out")


def test_the_sets_first_version_has_the_list_alone(tmp_path: Path) -> None:
    unpacked(tmp_path / "in")
    (tmp_path / "in/json_files/SoundBible/sb_final.json").write_text(json.dumps(ROWS["SoundBible"]))
    _, dataset = build_source("wavcaps", tmp_path / "in", tmp_path / "out", sources="SoundBible")
    assert read_samples(dataset)["SoundBible/2219"]["txt"] == "An airplane is landing."


@needs_zip
def test_a_missing_volume_is_named(tmp_path: Path) -> None:
    archives(tmp_path / "in")
    (tmp_path / "in/Zip_files/FreeSound/FreeSound.z01").unlink()
    with pytest.raises(
        UsageError,
        match=r"FreeSound.z01: there is no such file; FreeSound.zip is split into \d volumes",
    ):
        build_dataset("wavcaps", tmp_path / "in", tmp_path / "out")


@needs_zip
def test_a_damaged_volume_loses_its_own_members_alone(tmp_path: Path) -> None:
    archives(tmp_path / "in")
    volume = tmp_path / "in/Zip_files/FreeSound/FreeSound.z01"
    data = volume.read_bytes()
    at = len(data) // 3
    volume.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    report, dataset = build_source(
        "wavcaps", tmp_path / "in", tmp_path / "out", sources="FreeSound", max_failures=0.5
    )
    assert list(read_samples(dataset)) == ["FreeSound/2219"]
    assert next(iter(get_reasons(report).values())).startswith("unreadable archive: ")
    volume.write_bytes(data[:-100])
    report, dataset = build_source(
        "wavcaps", tmp_path / "in", tmp_path / "cut", sources="FreeSound", max_failures=0.5
    )
    assert list(read_samples(dataset)) == ["FreeSound/180913"]
    assert next(iter(get_reasons(report).values())).startswith(
        ("unreadable archive: ", "truncated archive: ")
    )


def test_what_is_no_wavcaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no JSON of AudioSet_SL"):
        build_dataset("wavcaps", tmp_path / "empty", tmp_path / "out")
    write_annotations(tmp_path / "in")
    with pytest.raises(
        UsageError, match=r"no folder of .flac and no .zip has AudioSet_SL in its path"
    ):
        build_dataset("wavcaps", tmp_path / "in", tmp_path / "out")
    with pytest.raises(UsageError, match="one of them is not among"):
        build_dataset("wavcaps", tmp_path / "in", tmp_path / "out", options={"sources": "Clotho"})
    write_tree(tmp_path / "in", {"Zip_files/SoundBible/SoundBible.zip": b"no zip"})
    with pytest.raises(
        UsageError, match=r"SoundBible\.zip is not a readable zip archive: it has no end record"
    ):
        build_dataset(
            "wavcaps", tmp_path / "in", tmp_path / "out", options={"sources": "SoundBible"}
        )


def test_archives_of_the_standard_library_are_read_too(tmp_path: Path) -> None:
    write_annotations(tmp_path / "in")
    (tmp_path / "in/Zip_files/SoundBible").mkdir(parents=True)
    with zipfile.ZipFile(
        tmp_path / "in/Zip_files/SoundBible/SoundBible.zip", "w", zipfile.ZIP_DEFLATED
    ) as archive:
        for name, data in sounds("SoundBible").items():
            with archive.open(zipfile.ZipInfo(f"a folder/{name}"), "w", force_zip64=True) as member:
                member.write(data)
    _, dataset = build_source("wavcaps", tmp_path / "in", tmp_path / "out", sources="SoundBible")
    assert read_samples(dataset)["SoundBible/2219"]["flac"] == sounds("SoundBible")["2219.flac"]


def test_the_recipe_builds(tmp_path: Path) -> None:
    tree = unpacked(tmp_path / "in")
    _, report = build_recipe(RECIPE, inputs=str(tree), out=str(tmp_path / "out"), workers=1)
    assert report.samples == 3
