"""The exported model is what transformers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onellm_dist.train.export import write_weights


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
    with pytest.raises(RuntimeError, match="expected one"):
        write_weights(tmp_path, iter([("other", torch.zeros(1))]), {"one": ((1,), torch.float32)})
