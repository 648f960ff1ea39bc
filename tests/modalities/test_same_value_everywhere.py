"""Whatever lies in a file: training, builder, preview, `generate` and processor agree about it.

They see the same value, or refuse the sample with the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_mutations import MODALITIES, make_sample

from onellm_dist.common.errors import SampleError
from onellm_dist.config.schema import DataSection, MixtureEntry
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.modalities import Part
from onellm_dist.model.pixels import make_input
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.model.processing.processor import OneLLMProcessor
from onellm_dist.serving.media import read_files
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.settings import OPTIONS, BuildSettings
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.shards.tools.preview_samples import render_samples

_SETTINGS = BuildSettings(
    **{**{name: option.default for name, option in OPTIONS.items()}, "name": "n", "licence": ""}
)
Seen = torch.Tensor | str
"""The model's input, or why there is none."""


def write_samples(root: Path, modality: str, samples: Sequence[dict[str, Part]]) -> Dataset:
    """A dataset of unchecked samples; keys are their numbers."""
    with DatasetWriter(root, name="strange", modalities=(modality,)) as writer:
        for number, parts in enumerate(samples):
            media = {part.extension: part.data for part in parts.values()}
            writer.add("train", f"{number:04d}", {**media, "txt": b"a caption"})
    return open_dataset(root)


def read_as_training(root: Path, modality: str, count: int) -> dict[int, Seen]:
    data = DataSection(
        root=root.parent,
        mixture=(MixtureEntry(path=Path(root.name), weight=1.0),),
        augment=False,
        global_batch=count,
        pack_llm_tokens=32_768,
        pack_encoder_tokens=400_000,
    )
    plan = Plan.open(data, load_toy_tokenizer(), 0, [modality], show=False)
    seen: dict[int, Seen] = {}
    for micro in plan.step(0, 1).ranks[0]:
        batch = Reader(plan.corpus).read(micro)
        for i, sample in enumerate(batch.sample_ids):
            number = int(sample.split("/")[-1].split("@")[0])
            skipped = batch.skipped_samples.get(i)
            value = make_input(modality, batch.values[modality][i])
            seen[number] = value if skipped is None else skipped
    return seen


def read_as_builder(folder: Path, modality: str, parts: dict[str, Part]) -> str | None:
    """Why the builder leaves the sample out; None: it is stored."""
    files: dict[str, Path] = {}
    for part in parts.values():
        files[part.extension] = folder / f"x.{part.extension}"
        files[part.extension].write_bytes(part.data)
    built = prepare_sample(RawSample("x", "x", files, "a caption"), (modality,), _SETTINGS)
    assert built.parts is None or all(
        built.parts[part.extension] == part.data for part in parts.values()
    )
    return None if built.parts is not None else built.reason


def check_alike(folder: Path, modality: str, seeds: Sequence[int]) -> int:
    """Returns how many samples are used; the others are refused by all."""
    samples = [make_sample(modality, seed) for seed in seeds]
    dataset = write_samples(folder / "strange", modality, samples)
    trained = read_as_training(folder / "strange", modality, len(samples))
    processor = OneLLMProcessor(load_toy_tokenizer())
    [shard] = dataset.shards("train")
    used = 0
    for number, parts in enumerate(samples):
        where = f"{modality}, seed {seeds[number]}"
        own = folder / f"{number}"
        own.mkdir()
        reason = read_as_builder(own, modality, parts)
        page = render_samples(dataset, [(shard, number)])
        path = own / f"x.{parts[modality].extension}"
        given: dict[str, Any] = {modality: path}
        seen = trained[number]
        if isinstance(seen, str):
            assert reason is not None, f"{where}: only training refuses: {seen}"
            words = reason.split(": ", 1)[1]
            assert words in seen, where
            assert "cannot be drawn" in page, where
            with pytest.raises(SampleError) as error:
                read_files([(modality, path)])
            assert words in error.value.what and error.value.do, where
            with pytest.raises(SampleError):
                processor(text="", **given)
        else:
            used += 1
            assert reason is None, f"{where}: the builder refuses: {reason}"
            assert "data:image/jpeg" in page and "cannot be drawn" not in page, where
            assert torch.equal(read_files([(modality, path)])[modality][0], seen), where
            value = processor(text="", **given)[f"{modality}_values"][0]
            assert torch.equal(value, seen), where
    return used


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES)
def test_all_doors_agree_about_strange_files(modality: str, tmp_path: Path) -> None:
    seeds = range(10 if modality == "video" else 15)
    assert 0.2 * len(seeds) < check_alike(tmp_path, modality, seeds) < len(seeds)


@pytest.mark.soak
@pytest.mark.parametrize("modality", MODALITIES)
def test_all_doors_agree_about_many_strange_files(modality: str, tmp_path: Path) -> None:
    for first in range(1000, 4000, 100):
        folder = tmp_path / f"{first}"
        folder.mkdir()
        check_alike(folder, modality, range(first, first + 100))
