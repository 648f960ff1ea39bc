"""The small parts of training: schedule, guard, ledger, metrics, exit file, configuration of DeepSpeed, whole checkpoints, freezing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stand_in import pack, sample
from torch import nn

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.resources import ds_configs_dir
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.schema import OptimSection, RunConfig, StabilitySection
from onellm_dist.modalities import all_modalities
from onellm_dist.model.lazy_weights import open_model
from onellm_dist.train.checkpoint.state import checkpoint_name, newest_whole, prune
from onellm_dist.train.engine.deepspeed.config import complete_config, load_ds_config, zero_stage
from onellm_dist.train.export import write_weights
from onellm_dist.train.optim.schedules import learning_rate
from onellm_dist.train.optim.stages import copies_of, freeze_for_stage, parameter_groups
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.metrics import drop_from
from onellm_dist.train.records.run_directory import lock_directory, prepare_directory
from onellm_dist.train.records.skipped_samples import Ledger
from onellm_dist.train.run import run_dir_of, without_launcher_arguments
from onellm_dist.train.stability.checks import Guard


def test_warm_up_then_cosine_to_min_lr() -> None:
    optim = OptimSection(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, optim, 24) for step in range(30)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)
    assert rates[24:] == pytest.approx([0.1] * 6)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_constant_schedule_and_decay_steps() -> None:
    assert learning_rate(900, OptimSection(lr=0.5, schedule="constant"), 1000) == 0.5
    assert learning_rate(50, OptimSection(lr=1.0, decay_steps=50), 1000) == 0.0


def test_guard_stops_after_skips_in_a_row_only() -> None:
    guard = Guard(StabilitySection(max_skipped=4), max_skipped_samples=5)
    for step in range(12):
        guard.count(step, applied=step % 4 == 0, new_skipped_samples=0)
    with pytest.raises(OneLLMError, match="in a row"):
        for step in range(4):
            guard.count(step, applied=False, new_skipped_samples=0)


def test_guard_counts_tombstones_of_earlier_starts() -> None:
    guard = Guard(StabilitySection(), max_skipped_samples=5, skipped_samples=4)
    guard.count(0, applied=True, new_skipped_samples=1)
    with pytest.raises(OneLLMError, match="max_skipped_samples is 5"):
        guard.count(1, applied=True, new_skipped_samples=1)


def test_ledger_is_read_back_by_any_rank_and_counts_once(tmp_path: Path) -> None:
    batch = pack([sample(1, ("a",)), sample(2, ("b",))])
    batch.skipped_samples[1] = "cut short"
    assert Ledger(tmp_path, 1).record(3, [batch]) == 1
    with (tmp_path / "skipped_samples-rank00001.jsonl").open("a") as out:
        out.write('{"step": 4, "sample_')  # a kill in the middle of a line
    again = Ledger(tmp_path, 0)
    assert again.known == {"s2": "cut short"}
    assert again.record(3, [batch]) == 0


def test_metrics_of_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(6)) + '{"step": 6, "lo')
    assert [line["step"] for line in drop_from(path, 4)] == [4, 5], "what is lost is told"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_the_rank_that_fails_first_is_believed(tmp_path: Path) -> None:
    assert ExitFile(tmp_path, 1).write("failed", reason="disk on fire") == 1
    assert ExitFile(tmp_path, 0).write("failed", reason="connection closed by peer") == 1
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["reason"], found["rank"], found["exit_code"]) == ("disk on fire", 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["exit.json"]


def test_every_shipped_deepspeed_configuration_loads() -> None:
    stages = {
        path.stem: zero_stage(load_ds_config(Path(path.stem)))
        for path in ds_configs_dir().glob("*.json")
    }
    assert stages == {
        "zero1": 1,
        "zero2": 2,
        "zero3": 3,
        "zero3_offload": 3,
        "zero3_hpz": 3,
        "cpu": 3,
        "cpu_small": 3,
    }


def test_gradients_accumulate_in_fp32() -> None:
    full = complete_config(load_ds_config(Path("zero3")), bf16=True, grad_clip=2.0)
    assert full["data_types"]["grad_accum_dtype"] == "fp32"
    assert full["bf16"]["enabled"] and full["gradient_clipping"] == 2.0


def test_deepspeed_does_not_time_each_forward_unless_asked() -> None:
    from deepspeed.utils.config import get_timers_config

    own = load_ds_config(Path("zero3"))
    assert not get_timers_config(complete_config(own, bf16=True, grad_clip=2.0)).enabled
    asked = {**own, "timers": {"throughput": {"enabled": True, "synchronized": False}}}
    timers = get_timers_config(complete_config(asked, bf16=True, grad_clip=2.0))
    assert timers.enabled and not timers.synchronized


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"optimizer": {}, "bf16": {}}', "optimizer .* bf16"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}',
            "offload_param to nvme",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}',
            "ratio 0.3",
        ),
    ],
)
def test_wrong_deepspeed_configurations_are_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_ds_config(path)


def test_unknown_deepspeed_configuration_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="zero3_hpz"):
        load_ds_config(Path("zero9"))


def test_bf16_without_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="stage 0"):
        complete_config({}, bf16=True, grad_clip=1.0)


def whole_checkpoint(folder: Path, *, size: int = 3) -> None:
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"abc")
    (folder / CHECKPOINT_MANIFEST).write_text(
        json.dumps({"version": 1, "files": {"rank-00000.safetensors": size}})
    )


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    whole_checkpoint(tmp_path / checkpoint_name(9))
    whole_checkpoint(tmp_path / checkpoint_name(10))
    whole_checkpoint(tmp_path / checkpoint_name(11), size=4)  # cut short
    (tmp_path / checkpoint_name(12)).mkdir()
    (tmp_path / f".{checkpoint_name(13)}.partial").mkdir()
    assert newest_whole(tmp_path) == tmp_path / checkpoint_name(10)
    assert newest_whole(tmp_path / "nowhere") is None


def test_the_last_n_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        whole_checkpoint(tmp_path / checkpoint_name(step))
    (tmp_path / f".{checkpoint_name(13)}.partial").mkdir()
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint_name(4), checkpoint_name(10)]


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    from onellm_dist.model.presets import build_meta_model

    return build_meta_model("toy")


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_align_trains_tokenizers_projectors_and_upm(toy: nn.Module) -> None:
    freeze_for_stage(toy, "align", set(all_modalities()))
    assert {name.split(".")[0] for name in trained(toy)} == {"tokenizers", "projectors", "upm"}
    assert {name for name, _ in toy.named_parameters()} - trained(toy) == {
        name for name, _ in toy.named_parameters() if name.startswith(("encoder.", "llm."))
    }


def test_parts_of_modalities_outside_the_mixture_are_frozen(toy: nn.Module) -> None:
    freeze_for_stage(toy, "align", {"audio"})
    owners = {
        name.split(".")[1] for name in trained(toy) if name.startswith(("tokenizers", "projectors"))
    }
    assert owners == {"audio"}


def test_tune_trains_the_llm_alone(toy: nn.Module) -> None:
    freeze_for_stage(toy, "tune", {"audio"})
    assert trained(toy) == {name for name, _ in toy.named_parameters() if name.startswith("llm.")}


def test_align_on_text_alone_is_refused(toy: nn.Module) -> None:
    with pytest.raises(UsageError):
        freeze_for_stage(toy, "align", set())


def test_biases_and_rms_norms_do_not_decay(toy: nn.Module) -> None:
    freeze_for_stage(toy, "align", set(all_modalities()))
    groups = parameter_groups(toy, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    names = {id(p): n for n, p in toy.named_parameters()}
    spared = {names[id(p)] for p in groups[1]["params"]}  # type: ignore[attr-defined]
    assert {n for n in trained(toy) if n.endswith("bias")} <= spared
    assert any("upm" in n and "norm" in n for n in spared)
    assert sum(len(g["params"]) for g in groups) == len(trained(toy))  # type: ignore[arg-type]
    layer_norms = {f"{n}.weight" for n, m in toy.named_modules() if isinstance(m, nn.LayerNorm)}
    assert not layer_norms & spared


def test_new_modalities_start_from_image() -> None:
    model, _, weights = open_model(path=None, preset="toy", seed=0)
    before = {n: weights.rows(n, 0, p.shape[0]) for n, p in model.named_parameters()}
    copies = copies_of(model, "image", ["audio", "point"])
    assert copies and all(n.startswith(("projectors.audio.", "projectors.point.")) for n in copies)
    weights.copy(copies)
    for name, parameter in model.named_parameters():
        owner = name.split(".")[1]
        source = name.replace(f".{owner}.", ".image.", 1) if name in copies else name
        assert torch.equal(weights.rows(name, 0, parameter.shape[0]), before[source])
    with pytest.raises(UsageError, match="smell"):
        copies_of(model, "image", ["smell"])


def test_launcher_arguments_and_run_dir(tmp_path: Path) -> None:
    assert without_launcher_arguments(["--local_rank=1", "toy/align_image", "a=b"]) == [
        "toy/align_image",
        "a=b",
    ]
    broken = tmp_path / "r.yaml"
    broken.write_text("run: {dir: here}\nnonsense: 1\n")
    assert run_dir_of(broken, []) == Path("here")
    assert run_dir_of(broken, ["run.dir=there"]) == Path("there")
    assert run_dir_of(Path("no/such"), []) == Path("runs/default")


def run_config(run_dir: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "model": {"preset": "toy"},
            "data": {"mixture": [{"path": "image"}], "global_batch": 1},
            "train": {"stage": "align", "steps": 1},
            "optim": {"lr": 1.0},
        }
    )


def test_one_start_of_a_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onellm_dist.train.records.run_directory.LOCK_PATIENCE_S", 0.1)
    first = lock_directory(tmp_path)
    with pytest.raises(OneLLMError, match="in use"):
        lock_directory(tmp_path)
    first.close()
    lock_directory(tmp_path).close()


def test_a_start_from_nothing_moves_an_earlier_run_aside(tmp_path: Path) -> None:
    whole_checkpoint(tmp_path / "checkpoints" / checkpoint_name(4))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    prepare_directory(run_config(tmp_path), None)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in tmp_path.glob("before-*/checkpoints/*")] == [checkpoint_name(4)]
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "config.yaml").exists()


def test_a_start_from_an_older_checkpoint_moves_the_newer_ones_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        whole_checkpoint(tmp_path / "checkpoints" / checkpoint_name(step))
    prepare_directory(run_config(tmp_path), tmp_path / "checkpoints" / checkpoint_name(4))
    assert newest_whole(tmp_path / "checkpoints") == tmp_path / "checkpoints" / checkpoint_name(4)
    assert sorted(p.name for p in tmp_path.glob("before-*/*")) == [
        checkpoint_name(8),
        checkpoint_name(12),
    ]


@pytest.mark.parametrize(
    ("dtype", "file_bytes", "files"),
    [(torch.float32, 5_000_000_000, 1), (torch.bfloat16, 2_000_000, 4)],
)
def test_weights_are_written_as_transformers_reads_them(
    tmp_path: Path, dtype: torch.dtype, file_bytes: int, files: int
) -> None:
    from onellm_dist.model.onellm import OneLLMForConditionalGeneration
    from onellm_dist.model.presets import load_model

    model, _ = load_model(path=None, preset="toy", seed=2, dtype=dtype)
    state = {name: p.detach() for name, p in model.named_parameters()}
    write_weights(
        tmp_path,
        iter(state.items()),
        {n: (tuple(p.shape), p.dtype) for n, p in state.items()},
        file_bytes,
    )
    model.config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model*.safetensors"))) >= files
    assert (tmp_path / "model.safetensors.index.json").is_file() == (files > 1)
    again = OneLLMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert all(
        torch.equal(p, state[name]) and p.dtype == dtype for name, p in again.named_parameters()
    )
    with pytest.raises(RuntimeError, match="was due"):
        write_weights(tmp_path, iter([("other", torch.zeros(1))]), {"one": ((1,), torch.float32)})
