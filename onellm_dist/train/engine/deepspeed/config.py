"""The DeepSpeed JSON: found by path or name, checked, and completed with what the recipe owns. Needs no DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import ds_configs_dir

DEFAULT = "zero3"
OWNED = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.pack_llm_tokens and data.pack_encoder_tokens",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim.*",
    "scheduler": "optim.*",
    "bf16": "train.precision",
    "fp16": "train.precision",
}
"""Keys that the recipe decides, and where."""


def load_ds_config(name: Path | None) -> dict[str, Any]:
    """The JSON at `name`: a file, or a name in `ds_configs/` (`zero3` where not given).

    Raises:
        UsageError: no such file, no JSON object, it sets what the recipe owns, or offloads where checkpoints cannot read.
    """
    path = _find(Path(DEFAULT) if name is None else name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: not JSON: {error}",
            "DeepSpeed cannot be configured.",
            "mend the line it names.",
        ) from None
    if not isinstance(config, dict):
        raise UsageError(
            f"{path}: a DeepSpeed configuration is a JSON object",
            "this file holds something else.",
            "start from one in ds_configs/.",
        )
    taken = [f"{key} (set {OWNED[key]} instead)" for key in config if key in OWNED]
    if taken:
        raise UsageError(
            f"{path}: the recipe decides {', '.join(taken)}",
            "two places would say different things.",
            "remove these keys from the JSON.",
        )
    _check_offload(path, config.get("zero_optimization", {}))
    return config


def _check_offload(path: Path, zero: dict[str, Any]) -> None:
    """Checkpoints read weights and moments in memory, and those of the one optimizer that the engine hands to DeepSpeed."""
    for key in ("offload_param", "offload_optimizer"):
        asked = zero.get(key) or {}
        if asked.get("device") == "nvme":
            raise UsageError(
                f"{path}: {key} to nvme",
                "checkpoints read the state in memory.",
                'take "device": "cpu".',
            )
        if asked.get("ratio", 1.0) != 1.0:
            raise UsageError(
                f"{path}: {key} with ratio {asked['ratio']}",
                "DeepSpeed then steps the rest with a second optimizer of its own, whose moments no checkpoint would hold.",
                'remove "ratio": all of the optimizer is offloaded.',
            )


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def complete(config: dict[str, Any], *, bf16: bool, grad_clip: float) -> dict[str, Any]:
    """`config` with the recipe's part filled in. Micro-steps are counted by the loop, so DeepSpeed is told of one.

    Raises:
        UsageError: bf16 without ZeRO (DeepSpeed 0.19 has no fp32 gradient accumulation there).
    """
    stage = zero_stage(config)
    if bf16 and stage == 0:
        raise UsageError(
            "ZeRO stage 0 with train.precision=bf16",
            "DeepSpeed accumulates gradients in bf16 there, which loses small ones.",
            "take engine.config=zero1 or higher, or train.precision=fp32.",
        )
    full = {
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without ZeRO DeepSpeed clips without telling the norm, and steps on NaN: the engine does both itself.
        "gradient_clipping": grad_clip if stage else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32", **config.get("data_types", {})},
        "zero_force_ds_cpu_optimizer": False,
    }
    full.setdefault("communication_data_type", "fp32")
    # On by default, and then it synchronises the device before and after every forward and step; metrics.jsonl has the rate.
    timers = config.get("timers", {})
    full["timers"] = {**timers, "throughput": {"enabled": False, **timers.get("throughput", {})}}
    return full


def _find(name: Path) -> Path:
    if name.is_file():
        return name
    known = ds_configs_dir()
    candidate = known / f"{name}.json"
    if candidate.is_file():
        return candidate
    names = ", ".join(sorted(p.stem for p in known.glob("*.json")))
    raise UsageError(
        f"no DeepSpeed configuration {name}",
        "it is neither a file nor a name in ds_configs/.",
        f"give a JSON file, or one of: {names}.",
    )
