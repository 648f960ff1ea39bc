"""Folders of MoE LLMs, whose experts transformers saves one by one, are read row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_models import FAMILIES, save_moe_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.weights.converted import ConvertedWeights
from onellm_dist.model.weights.lazy import SafetensorsWeights, find_weight_files, open_model

EXPERTS = "llm.model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.seconds
def test_a_saved_moe_llm_is_read_as_from_pretrained_reads_it(family: str, tmp_path: Path) -> None:
    save_moe_model(family, tmp_path)
    loaded = OneLLMForConditionalGeneration.from_pretrained(tmp_path)
    empty, _, weights = open_model(path=tmp_path, preset=None, seed=0)
    wanted = dict(loaded.named_parameters())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) - wanted.keys(), "this family is saved as it is"
    assert wanted.keys() == dict(empty.named_parameters()).keys()
    for name, parameter in wanted.items():
        for first, end in ((0, len(parameter)), (1, 2), (len(parameter) // 3, len(parameter))):
            assert torch.equal(weights.rows(name, first, end), parameter[first:end]), name
        assert weights.rows(name, 1, 1).shape == (0, *parameter.shape[1:])


def test_rows_of_stacked_experts_read_these_experts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_moe_model("qwen3_moe", tmp_path)
    _, _, weights = open_model(path=tmp_path, preset=None, seed=0)
    read: list[str] = []
    rows = SafetensorsWeights.rows

    def count(self: SafetensorsWeights, name: str, first: int, end: int) -> torch.Tensor:
        read.append(name)
        return rows(self, name, first, end)

    monkeypatch.setattr(SafetensorsWeights, "rows", count)
    part = weights.rows(EXPERTS, 2, 3)
    assert torch.equal(part, model.get_parameter(EXPERTS)[2:3])
    layer = "llm.model.layers.1.mlp.experts.2"
    assert sorted(read) == [f"{layer}.gate_proj.weight", f"{layer}.up_proj.weight"]


@pytest.mark.parametrize("fault", ["missing expert", "other shape", "unknown"])
def test_experts_that_do_not_fit_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    save_moe_model("qwen3_moe", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = "llm.model.layers.1.mlp.experts.3.up_proj.weight"
    if fault == "missing expert":
        del state[key]
        says = rf"{EXPERTS} cannot be made .*experts\.0\.gate_proj\.weight"
    elif fault == "other shape":
        state = {n: t[:8] if n.endswith("up_proj.weight") else t for n, t in state.items()}
        says = rf"mismatched_keys: llm\.model\.layers\.0\.mlp\.experts\.gate_up_proj, {EXPERTS}"
    else:
        state["llm.model.layers.9.mlp.experts.0.up_proj.weight"] = state[key].clone()
        says = r"unexpected_keys: llm\.model\.layers\.9\.mlp\.experts\.gate_up_proj"
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(OneLLMError, match=says):
        open_model(path=tmp_path, preset=None, seed=0)


def test_a_folder_with_fused_experts_is_read_as_it_is(tmp_path: Path) -> None:
    """As a training run exports it."""
    model = save_moe_model("mixtral", tmp_path)
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    empty, _, _ = open_model(path=tmp_path, preset=None, seed=0)
    files = find_weight_files(tmp_path)
    weights = ConvertedWeights(empty, SafetensorsWeights(files), files)
    assert weights.names == state.keys()
    assert all(torch.equal(weights.rows(n, 0, len(p)), p) for n, p in state.items())
    loaded = OneLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(p, state[n]) for n, p in loaded.named_parameters())
