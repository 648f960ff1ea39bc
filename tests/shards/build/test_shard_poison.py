"""A sample that ends its decoder is left out, and the rest is built as without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from planted_decoders import FAULTS, LIMITS, get_reason, make_poison, plant
from shard_worlds import all_bytes, array, contents, picture, sound, write_tree

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset, open_dataset
from onellm_dist.shards.build import registry
from onellm_dist.shards.build.dry_run import describe_build
from onellm_dist.shards.build.registry import complete_options, get_source
from onellm_dist.shards.build.request import BuildRequest
from onellm_dist.shards.sources.base import DatasetDescription, InputSplit, RawSample, Source
from onellm_dist.shards.tools.preview import preview_command

MAKE = {
    "image": ("jpg", picture),
    "audio": ("wav", sound),
    "point": ("npy", lambda seed: array((900, 6), seed)),
}
OPTIONS: dict[str, Any] = {"name": "same", "max_failures": 1, **LIMITS}


def write_inputs(folder: Path, modality: str, faults: tuple[str, ...], count: int = 12) -> Path:
    """Good files, with a poisonous one behind every second of the first."""
    extension, make = MAKE[modality]
    files: dict[str, bytes | str] = {}
    for i in range(count):
        files[f"{i:03d}.{extension}"] = make(i)
        files[f"{i:03d}.txt"] = f"caption {i}"
    for i, fault in enumerate(faults):
        files[f"{2 * i:03d}-{fault}.{extension}"] = make_poison(fault)
        files[f"{2 * i:03d}-{fault}.txt"] = "poison"
    return write_tree(folder, files)


def build(inputs: Path, out: Path, **options: Any) -> dict[str, str]:
    """The reasons of the samples that were left out, by key."""
    workers = options.pop("workers", 1)
    report = build_dataset("folder", inputs, out, options=OPTIONS | options, workers=workers)
    return {q.key: q.reason for q in report.quarantined}


def data_of(root: Path) -> dict[str, bytes]:
    """The dataset without what counts the samples that were left out."""
    found = all_bytes(root)
    return {n: d for n, d in found.items() if n not in ("quarantine.jsonl", "statistics.json")}


def expect(faults: tuple[str, ...]) -> dict[str, str]:
    return {f"{2 * i:03d}-{fault}": get_reason(fault) for i, fault in enumerate(faults)}


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch.setattr, *MAKE)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Any:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


def check_build(tmp_path: Path, modality: str, faults: tuple[str, ...], **options: Any) -> None:
    options["modality"] = modality
    build(write_inputs(tmp_path / "good", modality, ()), tmp_path / "without", **options)
    inputs = write_inputs(tmp_path / "in", modality, faults)
    assert build(inputs, tmp_path / "out", **options) == expect(faults)
    assert data_of(tmp_path / "out") == data_of(tmp_path / "without")
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert {line["key"]: line["reason"] for line in map(json.loads, lines)} == expect(faults)


@pytest.mark.parametrize("modality", MAKE)
@pytest.mark.seconds
def test_a_sample_that_crashes_or_eats_memory_is_left_out(tmp_path: Path, modality: str) -> None:
    check_build(tmp_path, modality, ("crash", "eat"))


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "workers"), [("image", 2), ("audio", 3)])
def test_every_fault_is_left_out_with_any_workers(
    tmp_path: Path, modality: str, workers: int
) -> None:
    check_build(tmp_path, modality, tuple(FAULTS), workers=workers)


@pytest.mark.parametrize("options", [{"resize": 16}, {"quality": 80}, {"dedup": "perceptual"}])
@pytest.mark.seconds
def test_a_picture_that_only_the_builder_decodes_is_left_out(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    check_build(tmp_path, "image", ("crash",), check=False, **options)


def test_a_sample_that_fails_once_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"

    def crash_once() -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setitem(FAULTS, "once", (crash_once, ""))
    inputs = write_inputs(tmp_path / "in", "image", ("once",))
    assert list(build(inputs, tmp_path / "out")) == ["000-once"]  # no picture, but read
    assert mark.exists()
    (bad,) = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert bad["reason"].startswith("unreadable image")


def list_one_key(inputs: Path, description: Any, **options: Any) -> Iterator[RawSample]:
    for path in sorted(inputs.glob("*.jpg")):
        yield RawSample("same", path.name, {"jpg": path}, "caption")


def test_a_repeated_key_is_another_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that ended its worker does not condemn a good one of the same key."""
    inputs = write_inputs(tmp_path / "in", "image", ("crash",), count=1)
    (inputs / "000-crash.jpg").rename(inputs / "!.jpg")
    found = DatasetDescription(("image",), [InputSplit("all", {}, count=2)])
    source = Source("same-key", "", plan=lambda *_, **__: found, raw_samples=list_one_key)
    known = {**registry.all_sources(), source.name: source}
    monkeypatch.setattr(registry, "all_sources", lambda: known)
    report = build_dataset(source.name, inputs, tmp_path / "out", options=OPTIONS)
    assert [(q.file, q.reason) for q in report.quarantined] == [("!.jpg", get_reason("crash"))]
    assert list(contents(open_dataset(tmp_path / "out"))) == ["same"]


def test_limits_are_options_and_part_of_the_request(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", "image", ())
    for options in ({"sample_seconds": -1}, {"sample_mb": -1}, {"sample_seconds": float("nan")}):
        with pytest.raises(UsageError, match="sample_seconds="):
            build(inputs, tmp_path / "out", **options)
    assert build(inputs, tmp_path / "out", sample_seconds=0, sample_mb=0) == {}


def test_a_dry_run_survives_too(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", "image", ("crash",))
    source = get_source("folder")
    own, settings = complete_options(source, OPTIONS, name="same")
    assert settings is not None
    request = BuildRequest(source, inputs, tmp_path / "out", 0, own, settings)
    text = describe_build(request, workers=1)
    assert "12 good" in text and get_reason("crash") in text


SCRIPT = """
import sys
sys.path[:0] = sys.argv[4:]
from planted_decoders import LIMITS, plant
plant(setattr, "image")
if __name__ == "__main__":
    from onellm_dist.shards import build_dataset
    options = {"name": "same", "max_failures": 1, "max_samples": 4, **LIMITS}
    build_dataset("folder", sys.argv[1], sys.argv[2], options=options, workers=int(sys.argv[3]))
"""


def start_script(inputs: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(inputs), str(out), str(workers)]
    return subprocess.Popen([*command, str(Path(__file__).parent)], stderr=subprocess.PIPE)


@pytest.mark.slow
def test_workers_that_build_whole_shards_write_the_same_bytes(tmp_path: Path) -> None:
    faults = ("crash", "eat", "hang")
    inputs = write_inputs(tmp_path / "in", "image", faults, count=13)
    build(inputs, tmp_path / "here", max_samples=4)
    builder = start_script(inputs, tmp_path / "there", 2)
    text = builder.communicate(timeout=300)[1].decode()
    assert builder.returncode == 0, text
    here, there = all_bytes(tmp_path / "here"), all_bytes(tmp_path / "there")
    assert here == there and here["quarantine.jsonl"].count(b"decoder failed") == len(faults)


@pytest.mark.slow
def test_workers_that_hang_end_with_a_builder_that_is_killed(tmp_path: Path) -> None:
    workers = 2
    inputs = write_inputs(tmp_path / "in", "image", ("hang",), count=20)
    builder = start_script(inputs, tmp_path / "out", workers)
    deadline = time.monotonic() + 100
    found: list[psutil.Process] = []
    while len(found) < 2 * workers - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
        children = psutil.Process(builder.pid).children(recursive=True)
        found = [c for c in children if "resource_tracker" not in " ".join(c.cmdline())]
    assert found and builder.poll() is None
    builder.kill()
    builder.communicate(timeout=60)
    _, alive = psutil.wait_procs(found, timeout=30)
    assert not alive


@pytest.mark.seconds
def test_a_preview_shows_the_other_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_inputs(tmp_path / "in", "image", ("crash",), count=4)
    assert build(inputs, tmp_path / "out", check=False) == {}
    assert len(contents(open_dataset(tmp_path / "out"))) == 5
    page = tmp_path / "page.html"
    assert preview_command(tmp_path / "out", page, previews=9) == 0
    html = page.read_text()
    assert html.count("<img") == 4 and html.count("its worker crashed (SIGSEGV), twice") == 1
    assert preview_command(tmp_path / "out", page, previews=0, keys=["000-crash", "001"]) == 0
    html, printed = page.read_text(), capsys.readouterr().out
    assert html.count("<img") == 1 and "its worker crashed (SIGSEGV), twice" in printed
