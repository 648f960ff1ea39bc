"""Mutated checkpoints of every format: a complete model, or a refusal in words."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import llama, onellm, save_meta, save_onellm, save_run
from gguf_files import tensors_of, write
from harness import fuzz
from mutators import mutate_any, mutate_bytes, mutate_json
from safetensors.torch import save as save_safetensors
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint
from onellm_dist.convert.integrity import check_integrity
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.tensors.pickled import get_state_dict, read_pickled
from onellm_dist.convert.tensors.safetensors_files import read_safetensors
from onellm_dist.shards.sources.readers.safe_pickle import load_plain

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def read_all(opened: OpenedCheckpoint) -> None:
    """Read what a conversion would read."""
    opened.check(ConversionOptions())
    check_integrity(opened)
    for tensor in opened.tensors.values():
        assert sum(len(block) for block in tensor.read_blocks()) == tensor.nbytes


def in_file(path: Path, run: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A surface that writes its input to a file first."""

    def surface(data: bytes) -> object:
        path.write_bytes(data)
        return run(path)

    return surface


def read_state(path: Path) -> None:
    for tensor in read_safetensors(path).values():
        tensor.read()


def read_pth(path: Path) -> None:
    for tensor in get_state_dict(read_pickled(path), path).values():
        tensor.read()


def torch_file(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def run_plain(tmp_path: Path, cases: int) -> None:
    anything = mutate_any(mutate_bytes)
    safetensors = save_safetensors(STATE)
    read = in_file(tmp_path / "m.safetensors", read_state)
    fuzz("safetensors", read, [safetensors], anything, cases=cases).require_clean()
    read = in_file(tmp_path / "m.pth", read_pth)
    fuzz("pth", read, [torch_file(zipped=True)], anything, cases=cases).require_clean()
    values = {"refs": [{"id": 3, "sentences": [{"tokens": ["a", "b"]}], "t": (1, 2.5, None)}]}
    seeds = [pickle.dumps(values, protocol=protocol) for protocol in (0, 2, 4)]
    read = in_file(tmp_path / "refs.p", load_plain)
    fuzz("pickle", read, seeds, anything, cases=cases).require_clean()


def run_gguf(tmp_path: Path, cases: int) -> None:
    seed = write(tmp_path / "seed.gguf", tensors_of(llama())).read_bytes()

    def mutate_header(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        # The weights are 96% of the file; what they are cannot be wrong in a way that is seen.
        header: bytes = mutate_bytes(rng, [seed[:1800]])
        return header + seed[1800:]

    def read(path: Path) -> None:
        read_all(open_checkpoint(path, format_name="gguf"))

    surface = in_file(tmp_path / "m.gguf", read)
    fuzz("gguf", surface, [seed], mutate_header, cases=cases).require_clean()


def run_folders(tmp_path: Path, cases: int) -> None:
    base = save_onellm(tmp_path / "base")
    dcp = tmp_path / "dcp"
    weights = {n: p.detach() for n, p in onellm(seed=3).named_parameters() if "upm" in n}
    save_distributed(weights, checkpoint_id=dcp, no_dist=True)
    options = ConversionOptions(base=base)
    surface = in_file(
        dcp / ".metadata", lambda path: read_all(open_checkpoint(dcp, options, "fsdp"))
    )
    seed = (dcp / ".metadata").read_bytes()
    fuzz("dcp", surface, [seed], mutate_bytes, cases=cases).require_clean()
    folder = save_run(tmp_path / "run", base, 1)
    content = json.loads((folder / "manifest.json").read_text())
    seeds = [json.dumps(content).encode()]
    content.pop("content_sha256")
    seeds.append(json.dumps(content).encode())
    surface = in_file(
        folder / "manifest.json", lambda path: read_all(open_checkpoint(folder, None, "run"))
    )
    anything = mutate_any(mutate_bytes, mutate_json)
    fuzz("run manifest", surface, seeds, anything, cases=cases).require_clean()
    shutil.copy(folder / "manifest.json", tmp_path / "last.json")


def run_configs(tmp_path: Path, cases: int) -> None:
    llama().save_pretrained(tmp_path / "hf")
    save_meta(tmp_path / "meta", llama())
    for name, kind, file in (
        ("hf", "hf", "config.json"),
        ("hf", "hf", "generation_config.json"),
        ("meta", "meta-llama", "params.json"),
    ):
        path = tmp_path / name / file
        seed = path.read_bytes()

        def read(path: Path, kind: str = kind) -> None:
            read_all(open_checkpoint(path.parent, None, kind))

        surface = in_file(path, read)
        anything = mutate_any(mutate_bytes, mutate_json)
        fuzz(f"{kind} {file}", surface, [seed], anything, cases=cases).require_clean()
        path.write_bytes(seed)


SURFACES = {"plain": run_plain, "gguf": run_gguf, "folders": run_folders, "configs": run_configs}


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES)
def test_mutated_checkpoints(surface: str, tmp_path: Path) -> None:
    SURFACES[surface](tmp_path, 400 if surface == "plain" else 60)


@pytest.mark.soak
@pytest.mark.parametrize("surface", SURFACES)
def test_mutated_checkpoints_for_hours(surface: str, tmp_path: Path) -> None:
    SURFACES[surface](tmp_path, 20_000 if surface == "plain" else 2000)
