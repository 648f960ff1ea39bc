"""`onellm shards count`: tokens and spans beforehand, shared by tasks; the start counts nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.resources import count_cpus
from onellm_dist.config.load import load_config
from onellm_dist.data.plan import Plan
from onellm_dist.data.token_counts import find_missing_token_counts
from onellm_dist.model.weights.lazy import open_empty_model
from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.shards.tools.index_existing import index_existing_shards
from onellm_dist.train.count_command import count_recipe


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    build_toyworld(
        root, seed=0, train_per_modality=12, test_per_modality=4, modalities=("image", "audio")
    )
    return root


@pytest.fixture
def recipe(tmp_path: Path, toy: Path) -> Path:
    shutil.copytree(toy, tmp_path / "toy")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: toy/align_image\n"
        f"run: {{dir: {tmp_path}/run}}\n"
        f"data:\n  root: {tmp_path}/toy\n  mixture: [{{path: image}}, {{path: audio}}]\n"
        "  global_batch: 8\n  validation: {split: test_seen, samples: 4, every: 5}\n"
    )
    return path


def find_missing(recipe: Path) -> int:
    """Shards that a start would count."""
    config = load_config(recipe, [])
    model, processor = open_empty_model(path=None, preset="toy")
    names = list(model.config.modalities)
    plan = Plan.open(config.data, processor.tokenizer, 0, names, build_counts=False, show=False)
    corpus = plan.corpus
    left = find_missing_token_counts(corpus.datasets, corpus.text_encoder.fingerprint, "train")
    plan.step(0, 2)
    return len(left)


@pytest.mark.seconds
def test_after_counting_a_start_counts_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="no such file"):
        find_missing(recipe)
    assert count_recipe(recipe, [], workers=1, task="1/2") == EXIT_DONE
    said = capsys.readouterr().out
    assert "12 of 24 samples counted now; 1 shard left to other tasks" in said
    assert count_recipe(recipe, [], workers=1, task="0/2") == EXIT_DONE
    assert "12 of 24 samples counted now; all are counted" in capsys.readouterr().out
    assert find_missing(recipe) == 0
    assert count_recipe(recipe, [], workers=1, task="0/1") == EXIT_DONE
    assert "train: 0 of 24 samples counted now; all are counted" in capsys.readouterr().out


def test_spans_are_counted_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spans = ["data.spans={image: 5}"]
    with pytest.raises(UsageError, match="index does not say which media") as found:
        count_recipe(recipe, spans, workers=1, task="0/1")
    assert "onellm shards index --media" in found.value.do
    index_existing_shards(recipe.parent / "toy" / "image", media=True)
    assert count_recipe(recipe, spans, workers=1, task="0/1") == EXIT_DONE
    assert "image: spans a sample: 1.00 of image (12 samples)" in capsys.readouterr().out


def test_the_cpus_of_the_job_count(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert count_cpus() == allowed
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert count_cpus() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4096")
    assert count_cpus() == allowed
