"""`data.pack_*_tokens: auto`: found at the start, and lowered for all ranks out of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from small_memory import write_constants
from small_onellm import get_small_model
from toy_runs import Runs
from zygote import get_zygote

from onellm_dist.common.errors import OneLLMError
from onellm_dist.config.load import load_config
from onellm_dist.config.train_sections import TrainSection
from onellm_dist.data.packing import TokenBudget
from onellm_dist.train.records.budget_file import BudgetRecord, read_budget_record
from onellm_dist.train.start.pack_budget import (
    PARTS,
    PackBudget,
    hash_recipe,
    is_out_of_memory,
    lower_budgets,
)

AUTO = ("data.pack_llm_tokens=auto", "data.pack_encoder_tokens=auto")
STEPS = 4
IMAGE = 257
"""Encoder tokens of an image."""
WHOLE = 12 * IMAGE
"""Those of a step: a micro-batch of each of two ranks has half of them."""


class BudgetRuns(Runs):
    """Starts of two ranks whose devices have little memory, on machines with constants."""

    def start(
        self, name: str, ranks: int, engine: list[str], memory: str, *more: str
    ) -> tuple[list[int], str]:
        """One start; exit codes and output of its ranks."""
        keys = [
            f"data.root={self.root / 'toy'}",
            f"run.dir={self.root / name}",
            "data.workers=0",
            f"data.mixture={self.mixture}",
            "data.global_batch=12",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            "optim.lr=1e-3",
            "train.precision=fp32",
            f"train.steps={STEPS}",
            "checkpoint.every=2",
            f"model.path={get_small_model()}",
            "model.preset=",
            "train.callbacks=[small_memory:SmallMemory]",
            *engine,
            *more,
        ]
        plant = {"environment": {"ONELLM_CACHE": str(self.root / "cache"), "SMALL_MEMORY": memory}}
        started = get_zygote().start(ranks, keys, plant)
        return started.wait(), started.output()

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        lines = (self.root / name / "events.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def exit(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / name / "exit.json").read_text())
        return found

    def assert_equal(self, name: str, other: str) -> None:
        """Both runs have the same samples and the same loss in each step."""
        first, second = self.metrics(name), self.metrics(other)
        assert first.keys() == second.keys() == set(range(STEPS))
        for step, line in first.items():
            assert line["sample_digest"] == second[step]["sample_digest"], step
            assert line["loss"] == pytest.approx(second[step]["loss"], abs=1e-5), step


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> BudgetRuns:
    """The folder, with a run of numbers in which nothing goes wrong."""
    runs = BudgetRuns(tmp_path_factory.mktemp("budgets"), ("image",), 24)
    write_constants(runs.root / "cache")
    codes, output = runs.start("numbers", 2, ["engine.config=zero2"], f"{10 * WHOLE} 0 0")
    assert codes == [0, 0], output
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine", "ranks"),
    [
        ("fsdp", ["engine.name=fsdp", "engine.config="], "1"),
        ("zero3", ["engine.config=cpu"], "0,1"),
    ],
)
def test_a_run_goes_on_with_smaller_budgets_and_the_same_losses(
    runs: BudgetRuns, name: str, engine: list[str], ranks: str
) -> None:
    """Memory is short from step 2 on: on one rank of FSDP2, and on both of ZeRO-3."""
    memory = f"{WHOLE // 2 - 1} {ranks} 2"
    codes, output = runs.start(name, 2, engine, memory, *AUTO)
    assert codes[int(ranks[0])] == 1 and 0 not in codes, output
    ended = runs.exit(name)
    assert ended["status"] == "failed" and ended["budget_lowered"] is True
    assert ended["failed_step"] == 2 and not ended["offending_samples"]
    assert "ran out of memory" in ended["reason"] and "for all ranks" in ended["reason"]
    (first,) = runs.events(name, "pack_budget")
    assert first["encoder_tokens"] >= WHOLE // 2 and first["lowered"] == 0
    recipe = yaml.safe_load((runs.root / name / "config.yaml").read_text())
    assert recipe["data"]["pack_encoder_tokens"] == first["encoder_tokens"]

    codes, output = runs.start(name, 2, engine, memory, *AUTO)
    assert codes == [0, 0], output
    (lowered,) = runs.events(name, "budget_lowered")
    assert lowered["step"] == 2 and str(lowered["rank"]) in ranks
    assert lowered["encoder_tokens"] < WHOLE // 2 <= lowered["old_encoder_tokens"]
    assert runs.events(name, "pack_budget")[-1]["encoder_tokens"] == lowered["encoder_tokens"]
    starts = runs.events(name, "start")
    assert [start["first_step"] for start in starts] == [0, 2]
    assert "data.pack_encoder_tokens" in str(runs.events(name, "config_changed")[-1]["changes"])
    runs.assert_equal("numbers", name)
    if name == "fsdp":
        check_other_numbers_of_ranks(runs, engine)


def check_other_numbers_of_ranks(runs: BudgetRuns, engine: list[str]) -> None:
    """One rank resumes after the two; the planner is asked for it, and its answer is lowered.

    What was learned does not hold for another recipe.
    """
    before = read_budget_record(runs.root / "fsdp")
    assert before is not None and len(before.lowered) == before.reported == 1
    assert before.encoder_share < 1
    memory = f"{10 * WHOLE} 0 0"
    codes, output = runs.start("fsdp", 1, engine, memory, *AUTO, f"train.steps={STEPS + 1}")
    assert codes == [0], output
    after = read_budget_record(runs.root / "fsdp")
    assert after is not None and set(after.planned) == {"1", "2"}
    assert after.encoder_share == before.encoder_share
    found = runs.events("fsdp", "pack_budget")[-1]
    assert found["encoder_tokens"] == round(after.planned["1"].encoder * after.encoder_share)
    assert len(runs.events("fsdp", "budget_lowered")) == 1  # once
    codes, output = runs.start(
        "fsdp",
        1,
        engine,
        memory,
        *AUTO,
        f"train.steps={STEPS + 2}",
        "train.activation_checkpointing=full",
    )
    assert codes == [0], output
    fresh = read_budget_record(runs.root / "fsdp")
    assert fresh is not None and fresh.encoder_share == 1 and set(fresh.planned) == {"1"}


@pytest.mark.slow
def test_budgets_that_cannot_be_lower_end_the_run(runs: BudgetRuns) -> None:
    engine = ["engine.name=fsdp", "engine.config="]
    lowered = 0
    for _ in range(6):
        codes, output = runs.start(
            "hopeless", 1, engine, f"{IMAGE - 1} 0 0", *AUTO, "data.global_batch=3"
        )
        assert codes == [1], output
        if "budget_lowered" not in runs.exit("hopeless"):
            break
        lowered += 1
    assert lowered > 1 and "with the smallest token budgets" in runs.exit("hopeless")["reason"]
    record = read_budget_record(runs.root / "hopeless")
    assert record is not None and len(record.lowered) == lowered
    assert record.lowered[-1].after.encoder == IMAGE
    assert len(runs.events("hopeless", "budget_lowered")) == lowered  # also those of starts before


@pytest.mark.soak
def test_local_ranks_start_again_by_themselves(runs: BudgetRuns) -> None:
    """The command of a user: an out-of-memory in its first step, and it ends well."""
    keys = [
        f"data.root={runs.root / 'toy'}",
        f"run.dir={runs.root / 'local'}",
        "data.workers=0",
        f"data.mixture={runs.mixture}",
        "data.global_batch=12",
        "train.steps=2",
        "launch.ranks=1",
        "train.precision=fp32",
        "train.callbacks=[small_memory:SmallMemory]",
        "checkpoint.resume=never",
        "engine.name=fsdp",
        "engine.config=",
        *AUTO,
    ]
    env = {
        **os.environ,
        "ONELLM_CACHE": str(runs.root / "cache"),
        "SMALL_MEMORY": f"{WHOLE - 1} 0 0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "onellm_dist.train", "toy/align_image", *keys]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the run starts again (1)" in done.stdout + done.stderr
    assert runs.exit("local")["status"] == "done"
    (lowered,) = runs.events("local", "budget_lowered")
    assert lowered["step"] == 0 and lowered["encoder_tokens"] < WHOLE


@pytest.mark.slow
def test_a_device_without_constants_is_refused(runs: BudgetRuns, tmp_path: Path) -> None:
    plant = {"environment": {"ONELLM_CACHE": str(tmp_path)}}
    keys = [
        f"data.root={runs.root / 'toy'}",
        f"run.dir={tmp_path / 'run'}",
        f"data.mixture={runs.mixture}",
        *AUTO,
    ]
    started = get_zygote().start(1, keys, plant)
    assert started.wait() == [2]
    assert "the planner has no constants for" in started.output()
    assert "onellm plan --calibrate" in started.output()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    "key",
    [
        "train.kernels=plain",
        "train.precision=bf16",
        "train.compile=blocks",
        "train.encoder=trainable",
    ],
)
def test_what_was_learned_holds_for_the_same_kernels_and_numbers_alone(key: str) -> None:
    own, other = load_config("toy/align_image", []), load_config("toy/align_image", [key])
    assert hash_recipe(own, ["Abacus"]) == hash_recipe(own, ["Abacus"])
    assert hash_recipe(own, ["Abacus"]) != hash_recipe(other, ["Abacus"])


def test_what_was_learned_holds_for_the_same_reference_of_pairs_alone() -> None:
    """A copy takes memory; adapters that are off take none."""
    lora = {"adapter": "{rank: 2}", "copy": "null"}
    adapter, copy = (
        load_config("dpo", [f"train.lora={value}", f"train.dpo.reference={name}"])
        for name, value in lora.items()
    )
    copy = copy.model_copy(
        update={"train": copy.train.model_copy(update={"lora": adapter.train.lora})}
    )
    assert hash_recipe(adapter, ["Abacus"]) != hash_recipe(copy, ["Abacus"])


def test_every_key_of_train_counts_for_budgets_or_is_known_not_to() -> None:
    without = {"callbacks", "early_stopping", "epochs", "log_every", "steps"}
    assert {*PARTS["train"]} == TrainSection.model_fields.keys() - without


def test_errors_that_mean_a_lack_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    text = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you"
    assert is_out_of_memory(RuntimeError(text))
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\nLast error:\n"
        "Cuda failure 2 'out of memory'",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    ("engine", "ranks", "says"),
    [
        (["engine.name=fsdp", "engine.config=", "engine.frozen=resident"], 2, True),
        (["engine.name=fsdp", "engine.config=", "engine.frozen=sharded"], 2, False),
        (["engine.name=fsdp", "engine.config=", "engine.frozen=resident"], 1, False),
        (["engine.config=zero2", "engine.frozen=resident"], 2, False),
    ],
)
def test_frozen_weights_that_could_be_sharded_are_named_out_of_memory(
    engine: list[str], ranks: int, says: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With budgets that can be lower, with the smallest, and with numbers in the recipe."""
    config = load_config("toy/align_image", [f"run.dir={tmp_path}", *engine])
    count = str(ranks)
    for smallest in (TokenBudget(10, 10), TokenBudget(100, 100), None):
        found = smallest and PackBudget(
            BudgetRecord("x", planned={count: TokenBudget(100, 100)}),
            TokenBudget(100, 100),
            smallest,
            ranks,
            found_now=True,
        )
        trainer: Any = SimpleNamespace(
            config=config,
            budget=found,
            dist=SimpleNamespace(rank=0, world_size=ranks),
            heartbeat=SimpleNamespace(step=2, phase="step"),
            plan=SimpleNamespace(find_fullest=lambda *_: TokenBudget(90, 90)),
        )
        caplog.clear()
        with (
            pytest.raises(RuntimeError if found is None else OneLLMError) as raised,
            lower_budgets(trainer),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        text = f"{raised.value} {caplog.text}"
        assert ("engine.frozen=sharded frees" in text) is says, text
