"""One flipped bit anywhere in what was written is found before it becomes a model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from checkpoints import llama, onellm, save_meta, save_onellm, save_run
from torch.distributed.checkpoint.state_dict_saver import save

from onellm_dist.common.checksums import SUMS, is_intact, seal
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import sha256_file
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.integrity import check_integrity
from onellm_dist.convert.opening import open_checkpoint


def flip(path: Path, place: int) -> bytes:
    """Flip one bit, counted from the start of the file; what it was before."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[place // 8] ^= 1 << place % 8
    path.write_bytes(changed)
    return before


@pytest.mark.slow
def test_flipped_bits_of_a_run_are_found(tmp_path: Path) -> None:
    base = save_onellm(tmp_path / "base")
    folder = save_run(tmp_path / "run", base, 2, precision="fp32")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["frozen"] = {
        "path": str(base),
        "files": {
            name: [(base / name).stat().st_size, 0, sha256_file(base / name)]
            for name in ("model.safetensors", "config.json")
        },
    }
    manifest.pop("content_sha256")
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    check_integrity(open_checkpoint(folder))
    rng = random.Random(0)
    files = [
        *(folder / f"rank-0000{rank}.safetensors" for rank in (0, 1)),
        folder / "manifest.json",
        base / "model.safetensors",
        base / "config.json",
    ]
    for number in range(100):
        path = files[number % len(files)]
        before = flip(path, rng.randrange(8 * path.stat().st_size))
        with pytest.raises(OneLLMError):
            check_integrity(open_checkpoint(folder, format_name="run"))
        path.write_bytes(before)
    path = files[0]
    flip(path, 8 * path.stat().st_size - 3)
    with pytest.raises(UsageError, match=r"rank-00000\.safetensors is damaged or was changed"):
        convert("run", folder, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.seconds
def test_flipped_bits_of_a_written_folder_are_found(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "hf")
    convert("hf", tmp_path / "hf", tmp_path / "out", to="hf", quiet=True)
    rng = random.Random(1)
    files = [tmp_path / "out" / name for name in ("model.safetensors", "config.json", SUMS)]
    check_integrity(open_checkpoint(tmp_path / "out", format_name="hf"))
    for number in range(100):
        path = files[number % len(files)]
        before = flip(path, rng.randrange(8 * path.stat().st_size))
        if path.name != SUMS or not _names_other_files(path):
            with pytest.raises(OneLLMError):
                check_integrity(open_checkpoint(tmp_path / "out", format_name="hf"))
        path.write_bytes(before)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=f"remove its line from {SUMS}"):
        open_checkpoint(tmp_path / "out", format_name="hf")


def _names_other_files(sums: Path) -> bool:
    """Whether a flip made the list name a file that is not there: the weights are complete."""
    try:
        names = {line.split("  ", 1)[1] for line in sums.read_text().splitlines()}
    except (IndexError, UnicodeDecodeError):
        return False
    return names != {"model.safetensors", "config.json"}


def test_the_checksums_inside_torchs_archives_are_read(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", llama())
    path = folder / "consolidated.00.pth"
    opened = open_checkpoint(folder)
    check_integrity(opened)
    place = path.read_bytes().find(opened.tensors["model.norm.weight"].read().numpy().tobytes())
    before = flip(path, 8 * place + 5)
    with pytest.raises(UsageError, match=r"consolidated\.00\.pth is damaged: data/\d+ has another"):
        convert("meta-llama", folder, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    path.write_bytes(before)
    convert("meta-llama", folder, tmp_path / "out", quiet=True)


def test_a_flipped_bit_of_a_distributed_checkpoint_is_found(tmp_path: Path) -> None:
    base = save_onellm(tmp_path / "base")
    weights = {n: p.detach() for n, p in onellm(seed=3).named_parameters()}
    save(weights, checkpoint_id=tmp_path / "dcp", no_dist=True)
    options = ConversionOptions(base=base)
    check_integrity(open_checkpoint(tmp_path / "dcp", options, "fsdp"))
    file = next((tmp_path / "dcp").glob("*.distcp"))
    place = file.read_bytes().find(weights["llm.model.norm.weight"].numpy().tobytes())
    flip(file, 8 * place)
    with pytest.raises(UsageError, match="is damaged"):
        convert("fsdp", tmp_path / "dcp", tmp_path / "out", options=options, quiet=True)


def test_a_run_over_other_frozen_weights_is_refused(tmp_path: Path) -> None:
    base, other = save_onellm(tmp_path / "base"), save_onellm(tmp_path / "other", seed=5)
    folder = save_run(tmp_path / "run", base, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert is_intact(manifest)
    files = {"model.safetensors": [0, 0, sha256_file(base / "model.safetensors")]}
    manifest.pop("content_sha256")
    manifest["frozen"] = {"path": str(base), "files": files}
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    convert("run", folder, tmp_path / "out", options=ConversionOptions(base=base), quiet=True)
    options = ConversionOptions(base=other)
    with pytest.raises(UsageError, match="is damaged or was changed"):
        convert("run", folder, tmp_path / "two", options=options, quiet=True)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        folder = save_meta(tmp_path / "meta", llama())
    finally:
        torch.serialization.set_crc32_options(True)
    convert("meta-llama", folder, tmp_path / "out", quiet=True)
