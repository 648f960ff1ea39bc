"""SHA256SUMS files as tools write them, damaged ones, and records of folders that are rewritten."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onellm_dist.common import checksums
from onellm_dist.common.checksums import (
    RECORD,
    SUMS,
    check_folder,
    hash_once,
    read_sums,
    renew_sums,
    write_sums,
)
from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import sha256_file
from onellm_dist.common.sums_file import format_line, parse_sums

ONE, TWO = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{ONE}  model.safetensors", "model.safetensors"),
        (f"{ONE} *model.safetensors", "model.safetensors"),
        (f"{ONE.upper()}  ./config.json\r", "config.json"),
        (f"SHA256 (a (1).bin) = {ONE}", "a (1).bin"),
        (f"SHA256(model.safetensors)= {ONE}", "model.safetensors"),
        (f"SHA2-256(model.safetensors)= {ONE.upper()}", "model.safetensors"),
        (f"\\{ONE}  a\\\\b\\nc\\rd", "a\\b\nc\rd"),
        (f"\\SHA256 (a\\\\b) = {ONE}", "a\\b"),
        (f"{ONE}  a\\b", "a\\b"),
        (f"{ONE}  sub/../config.json", None),
        (f"{ONE}  ../config.json", None),
        (f"{ONE}  /etc/passwd", None),
        (f"{ONE}   a leading blank", " a leading blank"),
        (f"{ONE}  ././sub//x.bin", "sub/x.bin"),
    ],
)
def test_every_form_of_a_line(line: str, name: str | None) -> None:
    text = f"# made by hand\n\n{line}\n   \n{TWO}  other\n"
    assert parse_sums(text) == {**({} if name is None else {name: ONE}), "other": TWO}


@pytest.mark.parametrize(
    "line",
    [
        f"{ONE} model.safetensors",
        f"{ONE[:-1]}  model.safetensors",
        f"{ONE[:-1]}G  model.safetensors",
        f"{'A' + ONE[1:]}  model.safetensors",
        f"#{ONE[1:]}  model.safetensors",
        f"{ONE}  ",
        f"\\{ONE}  a\\tb",
        f"\\{ONE}  a\\",
        f"{ONE}  a\x0b{TWO}  b",
        f"MD5 (a) = {ONE[:32]}",
        f"SHA256 (a) ={ONE}",
        f"{ONE}  other",
        "<html>",
    ],
)
def test_a_malformed_line_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / SUMS).write_text(f"{TWO}  other\n{line}\n")
    with pytest.raises(UsageError, match=rf"{SUMS} cannot be read: line 2 (is|has another)"):
        read_sums(tmp_path)


NAMES = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\r\\"), min_size=1
).filter(lambda name: name.strip(".") and "/" not in name)


@given(st.dictionaries(NAMES, st.sampled_from([ONE, TWO]), max_size=5))
def test_what_is_written_is_read(sums: dict[str, str]) -> None:
    text = "".join(format_line(digest, name) for name, digest in sums.items())
    assert parse_sums(text) == sums


def test_what_sha256sum_writes_is_read(tmp_path: Path) -> None:
    names = ["a b.json", "back\\slash.bin", "line\nbreak.bin", "ünï.pth"]
    for name in names:
        (tmp_path / name).write_text(name)
    for options in ([], ["--binary"], ["--tag"]):
        done = subprocess.run(
            ["sha256sum", *options, *names],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        found = parse_sums(done.stdout)
        assert found == {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    write_sums(tmp_path, names=names)
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, check=True)


@pytest.mark.seconds
def test_every_flipped_bit_of_a_sums_file_is_found_or_names_another_file(tmp_path: Path) -> None:
    """What is still read of a file is what was written of it."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    whole, known = (tmp_path / SUMS).read_bytes(), read_sums(tmp_path)
    silent = 0
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        (tmp_path / SUMS).write_bytes(data)
        try:
            found = read_sums(tmp_path)
        except UsageError:
            continue
        if found.keys() == known.keys():
            assert found != known, "read as if nothing had happened"
            with pytest.raises(UsageError, match="is damaged or was changed"):
                check_folder(tmp_path)
        else:
            silent += 1
            assert all(found.get(name) in (None, known[name]) for name in known)
    assert silent < 8 * sum(map(len, known)) + 16  # in a name, or in the end of a line


def test_entries_of_a_conversion_stay_inside_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    (tmp_path / "model").mkdir()
    entries = [{"file": name, "sha256": ONE} for name in ("../secret.json", str(outside))]
    (tmp_path / "model" / RECORD).write_text(json.dumps({"result": entries}))
    assert read_sums(tmp_path / "model") == {}
    check_folder(tmp_path / "model")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"result": 3}', "{", '{"result": [{}]}'])
def test_a_damaged_conversion_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(UsageError, match=rf"{RECORD} cannot be read"):
        read_sums(tmp_path)


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
    write_sums(folder, names=["tokenizer.json"])
    record = {"result": [{"file": "model.safetensors", "sha256": ONE}]}
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_records_of_files_that_were_written_anew_are_renewed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    with renew_sums(folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").unlink()
        (folder / "model-00001-of-00001.safetensors").write_text("new")
    assert not (folder / RECORD).exists()
    check_folder(folder)
    names = {"config.json", "model-00001-of-00001.safetensors", "tokenizer.json"}
    assert read_sums(folder).keys() == names
    (folder / "config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"sha256sum \*\.json \*\.safetensors > SHA256SUMS"):
        check_folder(folder)
    command = f"cd {folder} && sha256sum *.json *.safetensors > {SUMS}"
    subprocess.run(["bash", "-c", command], check=True)  # what the message says
    check_folder(folder)


def test_renewal_blesses_no_damage(tmp_path: Path) -> None:
    """Weights that rotted before the config was saved again are still found."""
    folder = make_folder(tmp_path / "model")
    (folder / "model.safetensors").write_text("Model.safetensors")
    with renew_sums(folder):
        (folder / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged"):
        check_folder(folder)


def test_what_was_written_in_part_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")

    def write_half() -> None:
        with renew_sums(folder):
            (folder / "model.safetensors").write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_half()
    with pytest.raises(UsageError, match="is damaged or was changed"):
        check_folder(folder)


def test_folders_without_records_stay_without(tmp_path: Path) -> None:
    with renew_sums(tmp_path / "new"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]
    folder = make_folder(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with renew_sums(folder):
        (folder / "notes.txt").write_text("not recorded")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == {**before, "notes.txt": b"not recorded"}


def test_a_file_is_read_once_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    rng = random.Random(0)
    read: list[Path] = []

    def count(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr("onellm_dist.common.checksums.sha256_file", count)
    for _ in range(20):  # within a tick of the file system's clock
        path.write_bytes(rng.randbytes(8))
        assert hash_once(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(checksums, "STABLE_AGE_NS", -1)
    read.clear()
    assert hash_once(path) == hash_once(path) and len(read) == 1
    os.utime(path)
    shutil.copy(path, tmp_path / "other")
    hash_once(tmp_path / "other")
    assert hash_once(path) == hash_once(path) and len(read) == 3
