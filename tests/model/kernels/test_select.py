"""Which attention backend is selected, and why."""

from __future__ import annotations

import pytest
import torch

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
