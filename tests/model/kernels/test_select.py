"""Which attention backend runs, and that its libraries are named in their room alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import onellm_dist
from onellm_dist.common.errors import UsageError
from onellm_dist.model.kernels.select import BACKEND_VARIABLE, select_backend


def test_the_backend_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    select_backend.cache_clear()
    name, reason = select_backend()
    assert name in ("flash3", "flash2", "varlen", "sdpa")
    assert reason
    if not torch.cuda.is_available():
        assert name == "sdpa"
        assert "no CUDA device" in reason
        monkeypatch.setenv(BACKEND_VARIABLE, "flash2")
        select_backend.cache_clear()
        with pytest.raises(UsageError, match="no CUDA device"):
            select_backend()
    monkeypatch.setenv(BACKEND_VARIABLE, "fast")
    select_backend.cache_clear()
    with pytest.raises(UsageError, match="no attention backend"):
        select_backend()
    monkeypatch.undo()
    select_backend.cache_clear()


def test_kernel_libraries_are_named_in_their_room_alone() -> None:
    root = Path(onellm_dist.__file__).parent
    rooms = (root / "model" / "kernels", root / "diagnostics")
    names = ("flash_attn", "varlen_attn")
    elsewhere = [
        str(path.relative_to(root))
        for path in sorted(root.rglob("*.py"))
        if path != root / "model" / "attention.py"
        and not any(room in path.parents for room in rooms)
        and any(name in path.read_text(encoding="utf-8") for name in names)
    ]
    assert elsewhere == []
