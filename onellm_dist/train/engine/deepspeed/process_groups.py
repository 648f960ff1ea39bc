"""DeepSpeed's module-level process groups, which outlive the process group that they belong to."""

from __future__ import annotations

GROUPS: dict[str, dict[object, object] | None] = {
    "_EXPERT_PARALLEL_GROUP": {},
    "_EXPERT_PARALLEL_GROUP_RANKS": {},
    "_EXPERT_DATA_PARALLEL_GROUP": {},
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS": {},
    "_ALL_TO_ALL_GROUP": {},
    "_WORLD_GROUP": None,
    "_ZERO_PARAM_INTRA_PARALLEL_GROUP": None,
    "_TENSOR_MODEL_PARALLEL_GROUP": None,
    "_MODEL_PARALLEL_GROUP": None,
    "_DATA_PARALLEL_GROUP": None,
    "mesh_device": None,
    "mpu": None,
}
"""Variables of `deepspeed.utils.groups` with their values at import (0.19.8)."""


def forget_process_groups() -> None:
    """Return DeepSpeed to what it is after its import.

    Otherwise a second run in the process would use the groups of the first, which are destroyed.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    for name, value in GROUPS.items():
        if hasattr(groups, name):
            setattr(groups, name, value.copy() if isinstance(value, dict) else value)
    comm.cdb = None
