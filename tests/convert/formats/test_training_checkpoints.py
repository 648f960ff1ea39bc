"""Training checkpoints: ours of any world size, DeepSpeed's, torch.distributed.checkpoint's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import onellm, save_onellm, save_run, trained_weights
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save
from zygote import run_ranks

from onellm_dist.common.checksums import seal
from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.inspect import describe_checkpoint
from onellm_dist.convert.opening import open_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (3, "bf16"), (4, "fp32")])
@pytest.mark.seconds
def test_ranges_of_any_number_of_ranks_become_the_model(
    ranks: int, precision: str, tmp_path: Path
) -> None:
    base = save_onellm(tmp_path / "base")
    save_run(tmp_path / "run", base, ranks, precision=precision, first_version=ranks == 1)
    convert("run", tmp_path / "run", tmp_path / "out", quiet=True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = {**{n: p.detach() for n, p in onellm().named_parameters()}, **trained_weights()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n].to(dtype)) for n in expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(
        words in card
        for words in ("- steps done: 10", "- stage: align", "loss of the last step: 2.5", "abc")
    )
    lines = "\n".join(describe_checkpoint(open_checkpoint(tmp_path / "run", ConversionOptions())))
    assert f"world size: {ranks}" in lines
    assert "stage: align" in lines


def test_a_run_whose_recipe_gave_the_model_span_positions(tmp_path: Path) -> None:
    """The rows that trained, and zeros for those that did not."""
    base = save_onellm(tmp_path / "base")
    trained, name = (f"projectors.{n}.span_positions.weight" for n in ("image", "imu"))
    rows = torch.randn(onellm(span_positions="learned").get_parameter(trained).shape)
    folder = save_run(tmp_path / "run", base, 2, precision="fp32", rows={trained: rows})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["span_positions"] = "learned"
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    opened, _ = convert("run", tmp_path / "run", tmp_path / "out", quiet=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[trained], rows) and rows.any()
    assert not found[name].any() and found.keys() == opened.tensors.keys()
    again = open_checkpoint(tmp_path / "out", ConversionOptions()).config
    assert again.span_positions == "learned"


def test_a_run_that_is_not_complete_or_lost_its_base(tmp_path: Path) -> None:
    base = save_onellm(tmp_path / "base")
    folder = save_run(tmp_path / "run", base, 2)
    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="give --base DIR"):
        convert("run", folder, tmp_path / "out", quiet=True)
    convert(
        "deepspeed",
        folder,
        tmp_path / "out",
        options=ConversionOptions(base=tmp_path / "moved"),
        quiet=True,
    )
    file = folder / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UsageError, match=r"is not complete: rank-00001.safetensors has \d+ of \d+ bytes"
    ):
        convert(
            "run",
            folder,
            tmp_path / "two",
            options=ConversionOptions(base=tmp_path / "moved"),
            quiet=True,
        )
    file.unlink()
    with pytest.raises(UsageError, match=r"rank-00001\.safetensors is missing"):
        convert(
            "run",
            folder,
            tmp_path / "two",
            options=ConversionOptions(base=tmp_path / "moved"),
            quiet=True,
        )


def save_zero(folder: Path, stage: int, world_size: int) -> None:
    """A ZeRO checkpoint as DeepSpeed 0.19.8 lays it out: its zero_to_fp32 reads it too."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    folder.mkdir(parents=True)
    weights = {f"model.{n}": w for n, w in trained_weights().items()}
    names = list(weights)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    shapes = [{n: weights[n].shape for n in group} for group in groups]
    ranks: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    for group in groups:
        if stage == 3:
            for rank in range(world_size):
                parts = []
                for n in group:
                    each = -(-weights[n].numel() // world_size)
                    padded = torch.nn.functional.pad(
                        weights[n].flatten(), (0, each * world_size - weights[n].numel())
                    )
                    parts.append(padded[rank * each : (rank + 1) * each])
                ranks[rank].append(torch.cat(parts))
        else:
            flat = torch.cat([weights[n].flatten() for n in group])
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * world_size)))
            for rank, part in enumerate(flat.chunk(world_size)):
                ranks[rank].append(part.clone())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(world_size):
        state = {
            "zero_stage": stage,
            "partition_count": world_size,
            key: ranks[rank],
            "loss_scaler": LossScaler(scale=1.0),
        }
        torch.save(
            {"optimizer_state_dict": state, "ds_config": {"a": 1}},
            folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        name = (
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            if stage == 3
            else "mp_rank_00_model_states.pt"
        )
        content: dict[str, Any] = {
            "module": {},
            "buffer_names": [],
            "param_shapes": shapes,
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "shared_params": {},
            "ds_version": "0.19.8",
            "global_steps": 10,
        }
        torch.save(content, folder / name)


@pytest.mark.parametrize(("stage", "world_size"), [(1, 2), (2, 3), (3, 4)])
@pytest.mark.seconds
def test_deepspeeds_own_checkpoints(stage: int, world_size: int, tmp_path: Path) -> None:
    """Beside DeepSpeed's own zero_to_fp32 on the same files."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    base = save_onellm(tmp_path / "base")
    save_zero(tmp_path / "ds" / "global_step10", stage, world_size)
    (tmp_path / "ds" / "latest").write_text("global_step10")
    opened, _ = convert(
        "deepspeed",
        tmp_path / "ds",
        tmp_path / "out",
        options=ConversionOptions(base=base),
        quiet=True,
    )
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds"))
    found, weights = load_file(tmp_path / "out" / "model.safetensors"), trained_weights()
    assert len(theirs) == len(weights)
    assert all(
        torch.equal(found[n], weights[n]) and torch.equal(theirs[f"model.{n}"], weights[n])
        for n in weights
    )
    assert torch.equal(found["llm.model.norm.weight"], onellm().llm.model.norm.weight)
    assert opened.notes["zero stage"] == stage
    (
        tmp_path / "ds/global_step10" / f"zero_pp_rank_{world_size - 1}_mp_rank_00_optim_states.pt"
    ).unlink()
    with pytest.raises(
        UsageError, match=f"{world_size - 1} of {world_size} ranks' files are there"
    ):
        open_checkpoint(tmp_path / "ds", ConversionOptions(base=base), "deepspeed")


def test_a_torch_distributed_checkpoint(tmp_path: Path) -> None:
    base = save_onellm(tmp_path / "base")
    weights = trained_weights()
    state = {
        "model": {n: w.clone() for n, w in weights.items()},
        "step": 4,
        "optim": {"x": torch.ones(2)},
    }
    save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert math.prod(next(iter(weights.values())).shape) > 1
    convert(
        "fsdp", tmp_path / "dcp", tmp_path / "out", options=ConversionOptions(base=base), quiet=True
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], weights[n]) for n in weights)
    with pytest.raises(UsageError, match="give --base DIR"):
        open_checkpoint(tmp_path / "dcp", ConversionOptions())


@pytest.mark.slow
def test_a_torch_distributed_checkpoint_of_three_ranks(tmp_path: Path) -> None:
    """Shards of rows, uneven and empty ones too; of columns; complete tensors; Adam's moments."""
    base = save_onellm(tmp_path / "base")
    worker = Path(__file__).parent / "dcp_worker.py"
    run_ranks(worker, [str(tmp_path / "dcp")], 3)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 3
    convert(
        "fsdp", tmp_path / "dcp", tmp_path / "out", options=ConversionOptions(base=base), quiet=True
    )
    found, weights = load_file(tmp_path / "out" / "model.safetensors"), trained_weights()
    assert any(w.shape[0] % 3 for w in weights.values()) and any(
        w.shape[0] < 3 for w in weights.values()
    )
    assert all(torch.equal(found[n], weights[n]) for n in weights)
    (tmp_path / "dcp" / "__1_0.distcp").unlink()
    with pytest.raises(UsageError, match=r"1 file missing: __1_0\.distcp"):
        convert(
            "fsdp",
            tmp_path / "dcp",
            tmp_path / "two",
            options=ConversionOptions(base=base),
            quiet=True,
        )
