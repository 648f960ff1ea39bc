"""Model folders that record checksums: flipped bits are found, and saving renews the records."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import small_model
from transformers import AutoModel, PreTrainedModel

from onellm_dist.common.checksums import RECORD, SUMS, check_folder, read_sums
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.conversion import convert
from onellm_dist.model import OneLLMForConditionalGeneration, OneLLMProcessor
from onellm_dist.model.presets import load_model, load_toy_tokenizer
from onellm_dist.serving.ask_files import open_for_generation


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `onellm convert` wrote."""
    root = tmp_path_factory.mktemp("models")
    small_model(words=512, modalities=["imu"]).save_pretrained(root / "source")
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(root / "source")
    convert("onellm", root / "source", root / "out", to="onellm", quiet=True)
    return root / "out"


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_found_whoever_loads_the_model(folder: Path, name: str) -> None:
    rng, whole = random.Random(name), (folder / name).read_bytes()
    loaders: list[Any] = [
        OneLLMForConditionalGeneration.from_pretrained,
        AutoModel.from_pretrained,
        lambda path: load_model(path=path, preset=None, seed=0),
        open_for_generation,
    ]
    for number in range(20):
        (folder / name).write_bytes(whole)
        flip(folder / name, rng.randrange(8 * len(whole)))
        if name == "config.json" and number % 4 == 1:
            continue  # transformers reads it before it knows the class
        with pytest.raises(OneLLMError, match=rf"{name} is damaged or was changed"):
            loaders[number % 4](folder)
    (folder / name).write_bytes(whole)
    for load in loaders[:3]:
        load(folder)


def test_saving_over_a_converted_folder_renews_its_records(folder: Path) -> None:
    model, processor = load_model(path=folder, preset=None, seed=0)
    with torch.no_grad():
        model.llm.lm_head.weight.mul_(2)
    assert (folder / RECORD).is_file()
    model.save_pretrained(folder, max_shard_size="300KB")
    processor.save_pretrained(folder)
    assert not (folder / RECORD).exists()
    assert not (folder / "model.safetensors").exists()
    check_folder(folder)
    assert {"config.json", "model.safetensors.index.json"} < read_sums(folder).keys()
    again, _ = load_model(path=folder, preset=None, seed=0)
    assert torch.equal(again.llm.lm_head.weight, model.llm.lm_head.weight)
    model.config.pad_token_id = 3
    model.config.save_pretrained(folder)
    load_model(path=folder, preset=None, seed=0)
    weights = next(folder.glob("model-00002-*.safetensors"))
    flip(weights, 8 * weights.stat().st_size - 1)
    with pytest.raises(UsageError, match=f"{weights.name} is damaged"):
        load_model(path=folder, preset=None, seed=0)


def test_another_program_that_rewrote_the_files_is_answered_in_words(folder: Path) -> None:
    model, _ = load_model(path=folder, preset=None, seed=0)
    with torch.no_grad():
        model.llm.lm_head.weight.mul_(2)
    PreTrainedModel.save_pretrained(model, folder)
    with pytest.raises(UsageError, match=rf"remove its line from {SUMS} .*or record the new files"):
        load_model(path=folder, preset=None, seed=0)


def test_a_second_process_writes_no_records(folder: Path) -> None:
    model, _ = load_model(path=folder, preset=None, seed=0)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    model.save_pretrained(folder, is_main_process=False)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert all(after[name] == before[name] for name in (RECORD, SUMS))
    assert json.loads((folder / RECORD).read_text())["to"] == "onellm"
