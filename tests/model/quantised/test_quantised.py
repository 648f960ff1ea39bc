"""Weights that torchao keeps in 8 bits: the numbers are those of the rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packs import small_model
from transformers import AutoModelForCausalLM, TorchAoConfig

from onellm_dist.model.generation.batched import Medium, Prompt, generate_batch

pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")
from torchao.quantization import Int8WeightOnlyConfig

KEPT = ["encoder", "tokenizers", "projectors", "upm", "llm.lm_head"]
INPUTS = {
    "input_ids": torch.tensor([[1, 5, 9, 7]]),
    "image_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),
}


def load(folder: Path, kept: list[str] | None) -> Any:
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def compute_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**INPUTS).logits
    return logits


def answer(model: Any) -> Any:
    imu = Medium("imu", torch.randn(6, 400, generator=torch.Generator().manual_seed(1)))
    prompts = [Prompt([1, 5, 9], [imu], max_new_tokens=3), Prompt([1, 7], max_new_tokens=4)]
    alone = model.generate(**INPUTS, max_new_tokens=4, do_sample=False).tolist()
    return alone, [each.tokens for each in generate_batch(model, prompts, end_ids=[2])]


def list_rounded(model: Any) -> list[str]:
    return [
        n
        for n, m in model.named_modules()
        if hasattr(getattr(m, "weight", None), "dequantize")
        and type(m.weight.data) is not torch.Tensor
    ]


@pytest.mark.parametrize("kept", [KEPT, None], ids=["llm", "all"])
def test_the_numbers_are_those_of_the_rounded_weights(
    kept: list[str] | None, tmp_path: Path
) -> None:
    plain: Any = small_model(modalities=["image", "imu"])
    plain.save_pretrained(tmp_path / "plain")
    rounded = load(tmp_path / "plain", kept)
    names = list_rounded(rounded)
    assert any(name.startswith("llm.model.layers.1.") for name in names)
    assert any(name.startswith("upm.") for name in names) == (kept is None)
    assert "llm.lm_head" not in names
    for name in names:
        weight = rounded.get_submodule(name).weight
        own = plain.get_submodule(name).weight
        own.data = weight.dequantize().to(own.dtype)
    wanted = compute_logits(plain)
    torch.testing.assert_close(compute_logits(rounded), wanted, atol=1e-4, rtol=1e-4)
    assert answer(rounded) == answer(plain.eval())
    rounded.save_pretrained(tmp_path / "rounded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
    assert list_rounded(again) == names
    assert torch.equal(compute_logits(again), compute_logits(rounded))
