"""Three stages at toy size: what each starts from, and what a run records on the way.

The second stage has a rate of 1e-30, so that it exports the model that it started with, bit for
bit.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zygote import get_zygote

from onellm_dist.evaluation.captioning import caption_split
from onellm_dist.model.presets import load_model
from onellm_dist.shards import open_dataset
from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.train.sample_log.command import samples_command

pytestmark = pytest.mark.slow
NEW = ("depth", "imu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("handover")
    build_toyworld(
        out / "toy", seed=0, train_per_modality=8, test_per_modality=3, modalities=("image", *NEW)
    )
    return out


def start(
    world: Path, recipe: str, name: str, modalities: tuple[str, ...], *more: str, ranks: int = 1
) -> str:
    mixture = ", ".join(f"{{path: {m}, weight: 1}}" for m in modalities)
    overrides = [
        f"data.root={world / 'toy'}",
        f"run.dir={world / name}",
        f"data.mixture=[{mixture}]",
        "data.global_batch=4",
        "data.workers=0",
        *more,
    ]
    started = get_zygote().start(ranks, overrides, recipe=recipe)
    started.done(400)
    return started.output()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def align_image(world: Path) -> str:
    """Stage I on two ranks, three steps, looked at from every side."""
    return start(
        world,
        "toy/align_image",
        "image",
        ("image",),
        "train.steps=3",
        "train.log_every=2",
        "optim.warmup_steps=0",
        "checkpoint.every=2",
        "track.with=[own_trackers:Lines]",
        "track.profile_steps=[1,1]",
        "track.underused_expert_share=1",
        "track.underused_expert_steps=1",
        "data.validation={split: test_seen, samples: 3, every: 3, generate: 3, new_tokens: 7}",
        ranks=2,
    )


@pytest.fixture(scope="module")
def weights(world: Path, align_image: str) -> dict[str, dict[str, torch.Tensor]]:
    """Run -> the model it exported; `fresh`: the preset's own."""
    new = ", ".join(NEW)
    start(
        world,
        "toy/align_all",
        "all",
        ("image", *NEW),
        f"model.path={world / 'image' / 'model'}",
        f"model.init_from_image=[{new}]",
        "train.steps=1",
        "optim.lr=1e-30",
        "optim.min_lr=0",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
    )
    start(
        world,
        "toy/tune",
        "tune",
        ("image", *NEW),
        f"model.path={world / 'all' / 'model'}",
        "train.steps=2",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "engine.name=fsdp",
        "engine.config=",
        "data.validation={split: test_seen, samples: 3, every: 2, generate: 1}",
        ranks=2,
    )
    fresh, _ = load_model(path=None, preset="toy", seed=0)
    return {"fresh": fresh.state_dict()} | {
        name: load_file(world / name / "model" / "model.safetensors")
        for name in ("image", "all", "tune")
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *prefixes: str) -> bool:
    names = [name for name in a if name.startswith(prefixes)]
    assert names
    return all(torch.equal(a[name], b[name]) for name in names)


def test_a_new_modality_starts_from_images_trained_parts_and_its_own_random_tokenizer(
    weights: dict[str, dict[str, torch.Tensor]],
) -> None:
    fresh, image, everything = weights["fresh"], weights["image"], weights["all"]
    assert not same(fresh, image, "projectors.image.", "upm.")
    trained = {name: value for name, value in image.items() if name.startswith("projectors.image.")}
    for new in NEW:
        for name, value in trained.items():
            assert torch.equal(everything[name.replace(".image.", f".{new}.", 1)], value), name
    assert same(
        image, everything, "projectors.image.", "upm.", "encoder.", "llm.", "projectors.audio."
    )
    assert same(fresh, everything, "tokenizers.", "encoder.", "llm.", "projectors.audio.")


def test_tuning_starts_from_the_aligned_model_and_moves_the_llm_alone(
    weights: dict[str, dict[str, torch.Tensor]],
) -> None:
    before, after = weights["all"], weights["tune"]
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith("llm.")}


def test_what_the_first_stage_records(
    world: Path, align_image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world / "image"
    metrics = lines(run / "metrics.jsonl")
    assert "MFU = model FLOPs per second" in align_image and "image " in align_image
    loads = [line["router_load"] for line in metrics]
    assert loads[0] is None and loads[1] is not None and loads[2] is not None, (
        "every two steps, and at the end"
    )
    assert set(loads[1]) == {"image"} and sum(loads[1]["image"]) == pytest.approx(1, abs=1e-5)
    assert metrics[1]["peak_memory_bytes"] > 200 << 20 and metrics[0]["peak_memory_bytes"] is None
    assert [line["checkpoint_stall_seconds"] > 0 for line in metrics] == [False, False, True]
    assert all(1 <= line["pack_balance"] < 2 for line in metrics)
    logged = lines(run / "trackers" / "onellm.jsonl")
    assert [line["step"] for line in logged] == [0, 1, 2]
    assert [line["train/loss"] for line in logged] == [line["loss"] for line in metrics]
    assert logged[1]["router_load/image/expert0"] == loads[1]["image"][0]
    (trace,) = (run / "profiles").iterdir()
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    events = lines(run / "events.jsonl")
    assert {event["expert"] for event in events if event["event"] == "expert_underused"} == {
        0,
        1,
        2,
    }, "none has all of the weight"
    assert next(event for event in events if event["event"] == "start")["mfu"].startswith("MFU = ")
    for step, line in enumerate(metrics):
        assert samples_command(run, step, None, as_json=True) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["sample_digest"], answer["state"], answer["saved"]) == (
            line["sample_digest"],
            "trained",
            True,
        )


def test_generated_samples_are_what_the_exported_model_says(
    world: Path, weights: dict[str, dict[str, torch.Tensor]]
) -> None:
    """ZeRO-3 on two ranks with captions; FSDP2 on two ranks with conversations.

    One rank of the second run has nothing to ask.
    """
    for name, count, dataset in (("image", 3, "image"), ("tune", 1, None)):
        answers = lines(world / name / "validation_samples.jsonl")
        assert [line["steps_done"] for line in answers] == [{"image": 3, "tune": 2}[name]] * count
        model, processor = load_model(path=world / name / "model", preset=None, seed=0)
        for line in answers:
            owner, _, key = line["id"].partition("@")[0].split("/")
            assert dataset in (None, owner)
            (caption,) = (
                c
                for c in caption_split(
                    model,
                    processor.tokenizer,
                    open_dataset(world / "toy" / owner),
                    "test_seen",
                    ask=name == "tune",
                )
                if c.key == key
            )
            assert line["reference"] == caption.reference
            assert line["modalities"] == [owner]
            said = (
                line["generated"].split("###")[0].rstrip("\ufffd").strip()
            )  # a hardly trained model stops anywhere, even within a character
            assert caption.prediction.startswith(said), "as far as the run's new_tokens go"
        assert ("Human:" in answers[0]["prompt"]) == (name == "tune")


def test_gradient_norms_are_recorded_by_part(
    world: Path, weights: dict[str, dict[str, torch.Tensor]]
) -> None:
    for name, parts in (
        ("image", {"image", "upm"}),
        ("all", {"image", *NEW, "upm"}),
        ("tune", {"llm"}),
    ):
        line = lines(world / name / "metrics.jsonl")[0]
        assert set(line["grad_norm_by_part"]) == parts
        assert sum(norm**2 for norm in line["grad_norm_by_part"].values()) == pytest.approx(
            line["grad_norm"] ** 2, rel=1e-4
        )
