"""The DeepSpeed JSON: found by path or name, checked, and completed with what the recipe decides.

Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import ds_configs_dir

DEFAULT = "zero3"
GRANULARITY = "stage3_module_granularity_threshold"
"""Key by which DeepSpeed chooses leaf modules by their size."""
SHOWN = 5
"""Problems that a message names."""
RECIPE_KEYS = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.pack_llm_tokens and data.pack_encoder_tokens",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim.*",
    "scheduler": "optim.*",
    "bf16": "train.precision",
    "fp16": "train.precision",
}
"""Keys of the JSON that the recipe decides, and the recipe's own key for each."""


class _Checked(BaseModel):
    """A part of the JSON; keys that are not read here are DeepSpeed's to check."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Offload(_Checked):
    device: str | None = None
    ratio: float = 1.0


class _Leaves(_Checked):
    classes: str | list[str] = []
    names: str | list[str] = []
    name_suffixes: str | list[str] = []


class _Zero(_Checked):
    stage: int = Field(0, ge=0, le=3)
    leaf_module: _Leaves | None = None
    offload_param: _Offload | None = None
    offload_optimizer: _Offload | None = None


class _Timers(_Checked):
    throughput: dict[str, Any] = Field(default_factory=dict)


class _CheckedConfig(_Checked):
    zero_optimization: _Zero = _Zero()
    data_types: dict[str, Any] = Field(default_factory=dict)
    timers: _Timers = _Timers()


def load_ds_config(name: Path | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Args:
        name: a file, or a name in `ds_configs/`; default: `zero3`.

    Raises:
        UsageError: there is no such file, it is not a JSON object or has a key twice, a value has
            the wrong type, it sets a key that the recipe decides, it offloads state to where
            checkpoints cannot read it, or it names leaf modules other than by class.
    """
    path = _find_config(Path(DEFAULT) if name is None else name)
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=_refuse_repeated_key)
    except (OSError, ValueError, RecursionError) as error:  # also integers of over 4300 digits
        raise UsageError(
            f"{path}: not JSON: {error}",
            "DeepSpeed cannot be configured.",
            "fix the line that the message names.",
        ) from None
    if not isinstance(config, dict):
        raise UsageError(
            f"{path}: a DeepSpeed configuration is a JSON object",
            "this file holds something else.",
            "start from one in ds_configs/.",
        )
    taken = [f"{key} (set {RECIPE_KEYS[key]} instead)" for key in config if key in RECIPE_KEYS]
    if taken:
        raise UsageError(
            f"{path}: the recipe decides {', '.join(taken)}",
            "two places would say different things.",
            "remove these keys from the JSON.",
        )
    _check_values(path, config)
    zero = config.get("zero_optimization", {})
    _check_offload(path, zero)
    _check_leaves(path, zero)
    return config


def _refuse_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} is there twice")
    return found


def _check_values(path: Path, config: dict[str, Any]) -> None:
    """Refuse values of another type than the keys have that are read here."""
    try:
        _CheckedConfig.model_validate(config)
    except ValidationError as error:
        raise UsageError(
            f"{path}: {format_problems(error)}",
            "DeepSpeed cannot be configured.",
            "see DeepSpeed's documentation of its JSON, and ds_configs/ for examples.",
        ) from None


def format_problems(error: ValidationError) -> str:
    """What pydantic found in a DeepSpeed JSON, with the keys, on one line."""
    found = []
    for problem in error.errors(include_url=False):
        key = ".".join(map(str, problem["loc"]))
        given = problem["input"]
        shown = "" if isinstance(given, dict | list) else f" (given: {given!r:.80})"
        found.append(f"{key}: {problem['msg']}{shown}")
    return "; ".join(found[:SHOWN]) + (" ..." if len(found) > SHOWN else "")


def _check_offload(path: Path, zero: dict[str, Any]) -> None:
    """Refuse offloading that checkpoints cannot read: they read one optimizer's state in memory."""
    for key in ("offload_param", "offload_optimizer"):
        offload = zero.get(key) or {}
        if offload.get("device") == "nvme":
            raise UsageError(
                f"{path}: {key} to nvme",
                "checkpoints read the state in memory.",
                'set "device": "cpu".',
            )
        if offload.get("ratio", 1.0) != 1.0:
            raise UsageError(
                f"{path}: {key} with ratio {offload['ratio']}",
                "DeepSpeed steps the rest with a second optimizer, which checkpoints would miss.",
                'remove "ratio": the whole optimizer is offloaded.',
            )


def _check_leaves(path: Path, zero: dict[str, Any]) -> None:
    """Refuse leaf modules that are not named by class: `name_leaves` checks classes alone."""
    leaves = zero.get("leaf_module") or {}
    keys = [f"leaf_module.{key}" for key in ("names", "name_suffixes") if leaves.get(key)]
    if zero.get(GRANULARITY):
        keys.append(GRANULARITY)
    if keys:
        raise UsageError(
            f"{path}: zero_optimization has {' and '.join(keys)}",
            "DeepSpeed may lose gradients of a leaf module that trains, and only those that are "
            "named by their class are left out where they do.",
            "name the blocks in leaf_module.classes.",
        )


def get_zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage that a DeepSpeed configuration asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def is_optimizer_offloaded(config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed configuration keeps gradients and optimizer state in host memory."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device") not in (None, "none")


def complete_config(config: dict[str, Any], *, bf16: bool, grad_clip: float) -> dict[str, Any]:
    """Return `config` with the recipe's part filled in.

    The training loop counts micro-batches itself, so DeepSpeed sees one per step.

    Raises:
        UsageError: bf16 without ZeRO (DeepSpeed 0.19 has no fp32 gradient accumulation there).
    """
    stage = get_zero_stage(config)
    if bf16 and stage == 0:
        raise UsageError(
            "ZeRO stage 0 with train.precision=bf16",
            "DeepSpeed accumulates gradients in bf16 there, which loses small ones.",
            "set engine.config=zero1 or higher, or train.precision=fp32.",
        )
    full = {
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without ZeRO DeepSpeed does not report the norm that it clips by, and it steps on NaN: the
        # engine does both.
        "gradient_clipping": grad_clip if stage else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32", **config.get("data_types", {})},
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed knows AdamW alone; every optimizer of ours is elementwise, which is all that
        # ZeRO needs.
        "zero_allow_untested_optimizer": True,
    }
    full.setdefault("communication_data_type", "fp32")
    # The timer is on by default and synchronises the device around every forward and step;
    # metrics.jsonl has the rate.
    timers = config.get("timers", {})
    full["timers"] = {**timers, "throughput": {"enabled": False, **timers.get("throughput", {})}}
    return full


def _find_config(name: Path) -> Path:
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
