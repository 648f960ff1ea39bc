"""`onellm plan`: its numbers, its JSON, and how it explains what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plain_counts import make_config, write_recipe
from stage_setup import freeze_for_stage

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, UsageError
from onellm_dist.planner.command import (
    PlanOptions,
    make_cluster,
    make_planner,
    run_plan,
)
from onellm_dist.planner.frozen import decide_placement
from onellm_dist.planner.hardware import all_gpu_kinds, find_gpus_here, get_gpu_kind
from onellm_dist.planner.pack_shapes import count_batch_bytes, make_meta_batch
from onellm_dist.planner.run_plan import build_model, vary

H100 = PlanOptions(gpu="h100", gpus_per_node=2)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def test_state_is_that_of_the_model_s_parameters(recipe: Path) -> None:
    model: Any = build_model(make_config())
    freeze_for_stage(model, "align", ["image", "audio"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    planner = make_planner(recipe, ["engine.config=zero3"], H100)
    state = planner.compute_state(planner.config)
    assert state.frozen_weights == frozen * 2 / 2
    assert state.trained_weights == trained * 2 / 2
    assert (state.gradients, state.optimizer) == (trained * 4 / 2, trained * 12 / 2)
    assert planner.parameters.total == trained + frozen


def test_the_optimizer_leaves_alone_what_it_does_not_step(recipe: Path) -> None:
    """Copies that are gathered for a step, and gradients of other ranks' shards, take memory."""
    resident = ["engine.name=fsdp", "engine.frozen=resident"]
    plans = [
        make_planner(recipe, [*resident, *more], H100)
        for more in ([], ["engine.reduce_every=step"])
    ]
    each, once = (planner.compute_state(planner.config) for planner in plans)
    trained = plans[0].parameters.trainable
    assert (each.gathered, once.gathered) == (0, 2 * trained)
    assert each.trained_weights == once.trained_weights == 0
    assert (each.gradients, once.gradients) == (trained * 4 / 2, trained * 4)
    assert once.device - each.device == 2 * trained + trained * 4 / 2
    seconds = [planner.compute_time(planner.config).optimizer for planner in plans]
    moved = trained / 2 * (4 + 2 * 12)
    assert seconds == [pytest.approx(moved / plans[0].cluster.gpu.bandwidth)] * 2


def test_processors_are_planned_with_the_kernels_that_they_run(recipe: Path) -> None:
    planner = make_planner(recipe, [], H100)
    processors = planner.cluster.gpu.model_copy(update={"shared": True})
    here = replace(planner, cluster=replace(planner.cluster, gpu=processors), _models={})
    for own, fused in ((planner, True), (here, False)):
        model = own.get_model("none")
        assert any(getattr(module, "fused", False) for module in model.modules()) is fused


@pytest.mark.seconds
def test_micro_batches_that_are_copied_ahead_take_memory(recipe: Path) -> None:
    """A GPU holds the one at work, the next one, and the one that is copied: `copy_ahead`."""
    planner = make_planner(recipe, [], H100)
    shape = planner.find_largest(planner.config)
    one = count_batch_bytes(make_meta_batch(shape, list(planner.modalities.values())))
    assert planner.compute_memory(planner.config).inputs == 3 * one
    processors = planner.cluster.gpu.model_copy(update={"shared": True})
    planner.cluster = replace(planner.cluster, gpu=processors)
    assert planner.compute_memory(planner.config).inputs == 2 * one


@pytest.mark.slow
def test_a_plan_is_printed_and_is_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan(recipe, [], H100) == EXIT_DONE
    text = capsys.readouterr().out
    assert "activations: UPM" in text and "laion400m is not there: samples of image" in text
    options = PlanOptions(gpu="h100", gpus_per_node=2, as_json=True)
    assert run_plan(recipe, [], options) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    memory = found["memory"]
    state = ("frozen_weights", "trained_weights", "gathered_weights", "gradients", "optimizer")
    parts = (*state, "working", "inputs", "engine_buffers", "context", "fragmentation")
    total = sum(memory[part] for part in parts) + sum(memory["activations"].values())
    assert memory["total"] == pytest.approx(total) and memory["fits"]
    step = found["step_seconds"]["total"]
    assert found["samples_per_second"] == pytest.approx(64 / step)
    assert found["mfu"] == pytest.approx(found["flops_per_step"] / step / (2 * 989e12))
    assert found["hours"] == pytest.approx(100 * step / 3600, rel=0.01)
    assert found["gpu_hours"] == pytest.approx(2 * found["hours"])


@pytest.mark.slow
def test_a_run_that_does_not_fit_says_what_it_needs(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = get_gpu_kind("h100")
    planner = make_planner(recipe, [], H100)
    need = planner.compute_memory(planner.config)
    fixed = need.total - sum(need.activations.values()) - need.working - need.inputs
    for room, words in (
        (fixed + 0.5 * (need.total - fixed), "data.pack_llm_tokens=5"),
        (0.9 * fixed, "more GPUs, or an engine that shards more"),
    ):
        small = real.model_copy(update={"memory_gb": room / 1e9})
        monkeypatch.setattr("onellm_dist.planner.command.get_gpu_kind", lambda _, s=small: s)
        assert run_plan(recipe, [], H100) == EXIT_FAILED
        assert "does not fit" in (text := capsys.readouterr().out) and words in text
        assert "engine.frozen=sharded" not in text
    tiny = real.model_copy(update={"memory_gb": 0.01})
    monkeypatch.setattr("onellm_dist.planner.command.get_gpu_kind", lambda _: tiny)
    keys = ["engine.name=fsdp", "engine.frozen=resident"]
    assert run_plan(recipe, keys, H100) == EXIT_FAILED
    assert "engine.frozen=sharded frees" in capsys.readouterr().out


@pytest.mark.slow
def test_frozen_weights_are_resident_where_that_fits_and_is_faster(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = PlanOptions(gpu="h100", nodes=2, gpus_per_node=2, network_gb_s=0.1)
    planner = make_planner(recipe, ["engine.name=fsdp"], slow)
    assert planner.config.engine.frozen == "resident"
    assert "they fit, and a step takes" in planner.data.notes[-1]
    auto = vary(planner.config, {"engine.frozen": "auto"})
    small = planner.cluster.gpu.model_copy(update={"memory_gb": 0.1})
    planner.cluster = replace(planner.cluster, gpu=small)
    found = decide_placement(planner, auto)
    assert found is not None and found.config.engine.frozen == "sharded"
    assert "would not fit" in found.reason
    # They fit, but nobody asked for a device that is nearly full.
    resident = vary(planner.config, {"engine.frozen": "resident"})
    need = planner.compute_memory(resident).total
    for memory, frozen in ((0.95, "sharded"), (0.85, "resident")):
        gpu = planner.cluster.gpu.model_copy(update={"memory_gb": need / memory / 1e9})
        planner.cluster = replace(planner.cluster, gpu=gpu)
        assert planner.compute_memory(resident).fits
        found = decide_placement(planner, auto)
        assert found is not None and found.config.engine.frozen == frozen
        assert ("less than 10% of the memory free" in found.reason) is (frozen == "sharded")
    # One rank gathers nothing, but the host has the hooks of what is sharded; they count for
    # nothing where the device is busy.
    alone = make_planner(recipe, ["engine.name=fsdp"], PlanOptions(gpu="h100", gpus_per_node=1))
    assert alone.config.engine.frozen == "resident"
    busy = {name: speed / 1e6 for name, speed in alone.cluster.gpu.peak_tflops.items()}
    gpu = alone.cluster.gpu.model_copy(update={"peak_tflops": busy})
    monkeypatch.setattr("onellm_dist.planner.command.get_gpu_kind", lambda _: gpu)
    alone = make_planner(recipe, ["engine.name=fsdp"], PlanOptions(gpu="h100", gpus_per_node=1))
    assert alone.config.engine.frozen == "sharded"
    assert "would not make a step faster" in alone.data.notes[-1]
    monkeypatch.undo()
    # Nothing is gathered that could stay, or the recipe says where weights lie.
    for keys in (
        ["engine.config=zero2"],
        ["engine.config=zero3"],
        ["engine.name=fsdp", "engine.frozen=sharded"],
    ):
        planner = make_planner(recipe, keys, slow)
        assert decide_placement(planner, planner.config) is None


def test_wrong_recipes_are_refused_as_by_train(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean train\.steps") as found:
        make_planner(recipe, ["train.step=3", "optim.name=adam9"], H100)
    assert "adam9" in str(found.value)
    with pytest.raises(UsageError, match=r"model\.preset=onellm-7b"):
        make_planner(recipe, ["model.path=nowhere"], H100)
    with pytest.raises(UsageError, match="does not divide the 2 ranks"):
        make_planner(recipe, ["engine.name=fsdp", "engine.shard_ranks=3"], H100)
    planner = make_planner(recipe, ["data.pack_encoder_tokens=1000"], H100)
    with pytest.raises(UsageError, match=r"sample of wavcaps needs .* 1213 encoder tokens"):
        planner.get_step(planner.config)


def test_data_that_is_not_there_must_be_described(recipe: Path) -> None:
    mixture = ["data.mixture=[{path: mine}]"]
    with pytest.raises(UsageError, match=r"--modalities laoin: data\.mixture has no dataset"):
        make_planner(recipe, [], PlanOptions(gpu="h100", modalities=("laoin=image",)))
    with pytest.raises(UsageError, match="--modalities mine=MODALITY"):
        make_planner(recipe, mixture, H100)
    said = PlanOptions(gpu="h100", modalities=("mine=image+imu",), text_tokens=50)
    data = make_planner(recipe, mixture, said).data
    assert data.combinations == (("image", "imu"),) and data.samples[0].text_tokens == 50
    assert not data.notes
    for wrong in ("mine=picture", "mine"):
        with pytest.raises(UsageError, match="--modalities"):
            make_planner(recipe, mixture, PlanOptions(gpu="h100", modalities=(wrong,)))
    with pytest.raises(UsageError, match="the model has no tokenizer"):
        make_planner(recipe, ["data.mixture=[{path: cap3d}]"], H100)


def test_every_gpu_has_constants_with_date_and_source() -> None:
    assert {"a100-80", "h100-80", "h200"} <= set(all_gpu_kinds())
    for kind in all_gpu_kinds().values():
        assert (
            str(kind.date) >= "2026"
            and all(kind.sources)
            and {"bf16", "fp32"} <= set(kind.peak_tflops)
        )
    assert get_gpu_kind("H100").kind == "h100-80"
    with pytest.raises(UsageError, match="use one of: a100-80"):
        get_gpu_kind("rtx")


def test_one_machine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path))  # without constants of its processors
    for options in (PlanOptions(), PlanOptions(gpu="h100", here=True)):
        with pytest.raises(UsageError, match="exactly one of --gpu and --here"):
            make_cluster(options)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="no GPU that torch can use"):
        make_cluster(PlanOptions(here=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name, kind in (("NVIDIA H100 80GB HBM3", "h100-80"), ("NVIDIA H200", "h200")):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _, name=name: name)
        assert (find_gpus_here()[0].kind, find_gpus_here()[1]) == (kind, 4)
    for other in ("T4", "GH200 480GB", "H100 PCIe", "H200 NVL", "H100 80GB HBM3 MIG 1g.10gb"):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _, other=other: f"NVIDIA {other}")
        with pytest.raises(UsageError, match=f"no constants for NVIDIA {other}"):
            find_gpus_here()


def test_a_slow_network_takes_its_time() -> None:
    fast = make_cluster(PlanOptions(gpu="h100", nodes=2))
    slow = make_cluster(PlanOptions(gpu="h100", nodes=2, network_gb_s=12.5))
    assert fast.world_size == 16 and fast.get_bus(8) == slow.get_bus(8) == 360e9
    assert slow.get_bus(16) == pytest.approx(10.6e9, rel=0.01) and fast.get_bus(16) > 300e9
