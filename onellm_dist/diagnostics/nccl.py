"""The version of NCCL."""

from __future__ import annotations

from typing import Any


def get_nccl_version() -> str:
    """NCCL's version, or "" if torch is built without it."""
    import torch

    if not torch.distributed.is_nccl_available():
        return ""
    read: Any = torch.cuda.nccl.version  # torch has no annotations there
    return ".".join(map(str, read()))
