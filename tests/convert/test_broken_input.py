"""Hostile and broken checkpoints: a clear refusal, nothing under the final name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, parity_weights, save_meta, save_onellm
from safetensors.torch import save_file

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.tensors.writers import FileDigest, TensorFile, write_tensor_file

HEADS = ConversionOptions(encoder_heads=4, upm_heads=4, llm_heads=4)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def nothing_at(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}.*"))


def test_a_pth_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save({"a": Trap(trap)}, tmp_path / "evil.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": Trap(trap)}))
    with pytest.raises(UsageError, match=r"asks for posix.mkdir, which is not a tensor"):
        convert("reference", tmp_path / "evil.pth", tmp_path / "out", quiet=True)
    with pytest.raises(UsageError, match="cannot be read"):
        convert("reference", tmp_path / "old.pth", tmp_path / "out", quiet=True)
    assert not trap.exists()
    assert nothing_at(tmp_path / "out")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert trap.exists(), "the trap would not have sprung anywhere"


def change_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite a .pth with another description."""
    with zipfile.ZipFile(path) as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("size", [4, 5])
def test_a_tensor_beyond_its_storage_is_refused(size: int, tmp_path: Path) -> None:
    """Bytes of other tensors, or of nothing, must not be read as this one's."""
    torch.save({"a": torch.zeros(size)}, tmp_path / "c.pth")
    change_pickle(
        tmp_path / "c.pth", lambda b: b.replace(f"K\x00K{chr(size)}".encode(), b"K\x00K\x7f")
    )
    with pytest.raises(UsageError, match="goes beyond its storage"):
        convert("reference", tmp_path / "c.pth", tmp_path / "out", quiet=True)


def test_files_cut_short(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    content = file.read_bytes()
    for length, words in (
        (len(content) - 10, "cut short"),
        (100, "header should have"),
        (3, "it has 3 bytes"),
    ):
        file.write_bytes(content[:length])
        with pytest.raises(UsageError, match=words):
            convert("hf", tmp_path / "hf", tmp_path / "out", quiet=True)
    save_meta(tmp_path / "meta", model)
    pth = tmp_path / "meta" / "consolidated.00.pth"
    pth.write_bytes(pth.read_bytes()[:-2000])
    with pytest.raises(UsageError, match="cannot be read"):
        convert("meta-llama", tmp_path / "meta", tmp_path / "out", quiet=True)
    assert nothing_at(tmp_path / "out")


@pytest.mark.seconds
def test_a_shard_that_is_missing_or_lacks_a_tensor(tmp_path: Path) -> None:
    save_onellm(tmp_path / "one")
    convert(
        "onellm",
        tmp_path / "one",
        tmp_path / "many",
        to="onellm",
        options=ConversionOptions(shard_bytes=400_000),
        quiet=True,
    )
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(
        UsageError, match=rf"1 of {len(shards)} files are missing: {shards[1].name}"
    ):
        convert("onellm", tmp_path / "many", tmp_path / "out", quiet=True)
    save_file({"other": torch.zeros(2)}, shards[1])
    with pytest.raises(UsageError, match=r"tensors of model.safetensors.index.json are in no file"):
        convert("onellm", tmp_path / "many", tmp_path / "out", quiet=True)
    shards[1].write_bytes(content)
    convert("onellm", tmp_path / "many", tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, "nan"), (torch.float16, "-inf"), (torch.bfloat16, "nan")]
)
@pytest.mark.seconds
def test_weights_that_are_not_finite(dtype: torch.dtype, value: str, tmp_path: Path) -> None:
    weights = parity_weights()
    key = "llma.layers.1.attention.wk.weight"
    weights[key] = weights[key].to(dtype)
    weights[key][5, 7] = float(value)
    torch.save(weights, tmp_path / "c.pth")
    with pytest.raises(
        OneLLMError, match=r"self_attn.k_proj.weight \[64, 64\] .* holds NaN or infinity"
    ):
        convert("reference", tmp_path / "c.pth", tmp_path / "out", options=HEADS, quiet=True)
    assert nothing_at(tmp_path / "out")
    allowed = ConversionOptions(
        encoder_heads=4, upm_heads=4, llm_heads=4, allow=("llm.model.layers.1.self_attn.k_*",)
    )
    convert("reference", tmp_path / "c.pth", tmp_path / "out", options=allowed, quiet=True)


def test_a_cast_that_overflows(tmp_path: Path) -> None:
    model = llama()
    model.model.norm.weight.data[3] = 1e6
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(OneLLMError, match=r"model.norm.weight .* holds NaN or infinity"):
        convert(
            "hf",
            tmp_path / "hf",
            tmp_path / "out",
            to="hf",
            options=ConversionOptions(dtype=torch.float16),
            quiet=True,
        )


@pytest.mark.parametrize("heads", [5, 64, 8])
def test_wrong_heads(heads: int, tmp_path: Path) -> None:
    """5 do not divide the width, 64 leave one channel, 8 contradict the rotary table."""
    save_meta(tmp_path / "meta", llama())
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(
        json.dumps({**params, "n_heads": heads, "n_kv_heads": heads})
    )
    words = (
        "rotary table is for 16" if heads == 8 else "does not split a width of 64 into even heads"
    )
    with pytest.raises(UsageError, match=words):
        convert("meta-llama", tmp_path / "meta", tmp_path / "out", quiet=True)


def test_params_that_contradict_the_weights(tmp_path: Path) -> None:
    save_meta(tmp_path / "meta", llama(kv_heads=2))
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(
        json.dumps({**params, "n_kv_heads": 4, "dim": 128})
    )
    with pytest.raises(
        UsageError,
        match=r"dim is 128, the tensors have 64; n_kv_heads .* is 64, the tensors have 32",
    ):
        convert("meta-llama", tmp_path / "meta", tmp_path / "out", quiet=True)


@pytest.mark.seconds
def test_keys_are_allowed_by_name(tmp_path: Path) -> None:
    """An allowed missing key is initialised and recorded; an unknown one is dropped."""
    weights = parity_weights()
    del weights["llma.routers.rgbd.fc1.bias"]
    weights["llma.extra.weight"] = torch.zeros(2)
    torch.save(weights, tmp_path / "c.pth")
    allow = ("projectors.depth.router.fc1.bias", "llma.extra.*")
    options = ConversionOptions(encoder_heads=4, upm_heads=4, llm_heads=4, allow=allow)
    _, record = convert(
        "reference", tmp_path / "c.pth", tmp_path / "out", options=options, quiet=True
    )
    assert record["initialised"] == ["projectors.depth.router.fc1.bias"]
    assert len(record["allowed"]) == 2
    with pytest.raises(UsageError, match=r"1 key does not fit"):
        convert(
            "reference",
            tmp_path / "c.pth",
            tmp_path / "two",
            options=ConversionOptions(encoder_heads=4, upm_heads=4, llm_heads=4, allow=allow[:1]),
        )


def test_an_output_is_replaced_only_when_asked_and_only_if_it_was_written_here(
    tmp_path: Path,
) -> None:
    llama().save_pretrained(tmp_path / "hf")
    _, first = convert("hf", tmp_path / "hf", tmp_path / "out", to="hf", quiet=True)
    with pytest.raises(UsageError, match="is not empty"):
        convert("hf", tmp_path / "hf", tmp_path / "out", to="hf", quiet=True)
    llama(seed=5).save_pretrained(tmp_path / "hf")
    _, second = convert(
        "hf", tmp_path / "hf", tmp_path / "out", to="hf", overwrite=True, quiet=True
    )
    assert first["result"][0]["sha256"] != second["result"][0]["sha256"]
    with pytest.raises(UsageError, match="only a folder that a conversion wrote"):
        convert("hf", tmp_path / "hf", tmp_path / "hf", to="hf", overwrite=True, quiet=True)


def test_a_killed_conversion_resumes_from_its_complete_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_onellm(tmp_path / "one")
    options, name = (
        ConversionOptions(shard_bytes=400_000),
        f"{convert.__module__}.write_tensor_file",
    )
    seen: list[str] = []

    def recording(path: Path, file: TensorFile, **arguments: Any) -> FileDigest:
        seen.append(file.name)
        return write_tensor_file(path, file, **arguments)

    def failing(path: Path, file: TensorFile, **arguments: Any) -> FileDigest:
        seen.append(file.name)
        if len(seen) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensor_file(path, file, **arguments)

    monkeypatch.setattr(name, failing)
    with pytest.raises(OneLLMError, match="the disk is full"):
        convert(
            "onellm",
            tmp_path / "one",
            tmp_path / "out",
            to="onellm",
            options=options,
            workers=1,
            quiet=True,
        )
    assert not (tmp_path / "out").exists()
    kept = sorted(p.name for p in (tmp_path / ".out.partial").glob("*.safetensors"))
    assert kept
    monkeypatch.setattr(name, recording)
    seen.clear()
    _, record = convert(
        "onellm",
        tmp_path / "one",
        tmp_path / "out",
        to="onellm",
        options=options,
        workers=1,
        quiet=True,
    )
    assert not set(kept) & set(seen)
    monkeypatch.undo()
    _, afresh = convert(
        "onellm", tmp_path / "one", tmp_path / "again", to="onellm", options=options, quiet=True
    )
    assert record["result"] == afresh["result"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_fills(tmp_path: Path) -> None:
    """A real full disk: 3 MB of room for 1 MB, minus what somebody else writes meanwhile."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    ).returncode:
        pytest.skip("mount is not allowed here")
    try:
        save_onellm(tmp_path / "one")
        with pytest.raises(UsageError, match="GB are needed"):
            convert("onellm", tmp_path / "one", disk / "out", to="onellm", quiet=True)
        assert list(disk.iterdir()) == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("onellm_dist.convert.staging._check_room", lambda *_: None)
            (disk / "ballast").write_bytes(b"x" * 1_500_000)
            with pytest.raises(OneLLMError, match="the disk is full"):
                convert(
                    "onellm",
                    tmp_path / "one",
                    disk / "out",
                    to="onellm",
                    options=ConversionOptions(shard_bytes=300_000),
                    quiet=True,
                )
            assert not (disk / "out").exists()
            (disk / "ballast").unlink()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
