"""Generated samples: what the packed forward decodes is what the model's own generation gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onellm_dist.common.run_files import VALIDATION_SAMPLES
from onellm_dist.config.schema import DataSection, MixtureEntry, ValidationSection
from onellm_dist.data.validation import open_validation_plan
from onellm_dist.evaluation.captioning import caption_split
from onellm_dist.modalities import get_modality
from onellm_dist.model.presets import load_model
from onellm_dist.packed import PackedBatch
from onellm_dist.shards import open_dataset
from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.callbacks.sample_generation import SampleGeneration

MODALITIES = ("image", "imu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers")
    build_toyworld(out, seed=0, train_per_modality=4, test_per_modality=3, modalities=MODALITIES)
    return out


@pytest.fixture(scope="module")
def loaded() -> Any:
    model, processor = load_model(path=None, preset="toy", seed=3)
    with torch.no_grad():
        for parameter in (
            model.llm.parameters()
        ):  # random weights repeat one token for ever; sharper ones say several
            parameter.mul_(3)
    model.train(False)
    return model, processor.tokenizer


class LocalEngine:
    """An engine of one process that counts its forwards."""

    def __init__(self, model: Any) -> None:
        self.model, self.forwards = model, 0

    def logits(self, batch: PackedBatch) -> torch.Tensor:
        self.forwards += 1
        values: torch.Tensor = self.model.compute_packed_logits(batch)[0]
        return values


class Board(Callback):
    """Keeps the texts that are shown on it."""

    def __init__(self, shown: list[str]) -> None:
        self.shown = shown

    def on_text(self, name: str, text: str, steps_done: int) -> None:
        self.shown.append(f"{steps_done} {name} {text}")


def generate(
    toy: Path,
    loaded: Any,
    out: Path,
    text_format: str,
    rank: int,
    world_size: int,
    wanted: ValidationSection,
    **budget: int,
) -> tuple[list[Any], int]:
    """The lines that a rank writes, and the number of its forward passes."""
    model, tokenizer = loaded
    entries = tuple(MixtureEntry(path=Path(name)) for name in MODALITIES)
    section: dict[str, Any] = {
        "root": toy,
        "mixture": entries,
        "global_batch": 4,
        "validation": wanted,
        "text_format": text_format,
        "max_text_tokens": 300,
        "workers": 0,
        **budget,
    }
    data = DataSection(**section)
    plan = open_validation_plan(data, tokenizer, 0, list(model.config.modalities))
    dist: Any = SimpleNamespace(
        rank=rank,
        world_size=world_size,
        is_rank_zero=True,
        device=torch.device("cpu"),
        gather=lambda own: [own],
        sum=lambda tensor: None,
    )
    engine: Any = LocalEngine(model)
    shown: list[str] = []
    board = Board(shown)
    generation = SampleGeneration(
        wanted, plan=plan, engine=engine, tokenizer=tokenizer, dist=dist, run_dir=out
    )
    trainer: Any = SimpleNamespace(callbacks=board)
    generation.attach(trainer)
    generation.on_validation(7)
    path = out / VALIDATION_SAMPLES
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len(shown) == len(rows)
    assert all(
        f"7 validation/{row['id']} **{row['generated']}**" in text
        for row, text in zip(rows, shown, strict=True)
    )
    return rows, engine.forwards


@pytest.mark.parametrize("text_format", ["caption", "conversation"])
@pytest.mark.seconds
def test_what_is_decoded_is_what_the_model_says(
    toy: Path, loaded: Any, tmp_path: Path, text_format: str
) -> None:
    wanted = ValidationSection(split="test_seen", samples=6, every=1, generate=5, new_tokens=9)
    model, tokenizer = loaded
    known = {
        f"{name}/{caption.key}": caption
        for name in MODALITIES
        for caption in caption_split(
            model,
            tokenizer,
            open_dataset(toy / name),
            "test_seen",
            ask=text_format == "conversation",
        )
    }
    found: dict[str, dict[str, Any]] = {}
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        rows, _ = generate(toy, loaded, tmp_path / f"rank{rank}", text_format, rank, 2, wanted)
        assert len(rows) == (3, 2)[rank]
        found |= {row["id"]: row for row in rows}
    assert len(found) == 5
    for name, row in found.items():
        owner, _, key = name.partition("@")[0].split("/")
        caption = known[f"{owner}/{key}"]
        assert (row["steps_done"], row["modalities"], row["reference"]) == (
            7,
            [owner],
            caption.reference,
        )
        assert row["generated"] and caption.prediction.startswith(row["generated"])
        assert ("### Human:" in row["prompt"]) == (text_format == "conversation")
    assert len({row["generated"] for row in found.values()}) > 1


def test_a_rank_without_a_question_runs_along(toy: Path, loaded: Any, tmp_path: Path) -> None:
    wanted = ValidationSection(split="test_seen", samples=6, every=1, generate=1, new_tokens=4)
    rows, forwards = generate(toy, loaded, tmp_path, "caption", 1, 2, wanted)
    assert rows == [] and forwards == 1, (
        "one forward, after which every rank is done (here: it is alone)"
    )


@pytest.mark.seconds
def test_questions_beyond_the_caps_are_asked_in_several_packs_the_same_number_on_every_rank(
    toy: Path, loaded: Any, tmp_path: Path
) -> None:
    """Under a budget of one question, rank 0 has three packs, and rank 1 two and an empty one."""
    wanted = ValidationSection(split="test_seen", samples=6, every=1, generate=5, new_tokens=4)
    cap = max(get_modality(name).encoder_tokens for name in MODALITIES)
    rows: dict[str, list[Any]] = {}
    for rank in range(2):
        for name, budget in (("one", {}), ("several", {"pack_encoder_tokens": cap})):
            out = tmp_path / f"{name}{rank}"
            out.mkdir()
            found, forwards = generate(toy, loaded, out, "caption", rank, 2, wanted, **budget)
            rows.setdefault(name, []).extend(found)
            assert forwards >= 3 if budget else forwards <= 4
    assert rows["one"] == rows["several"] and len(rows["one"]) == 5
