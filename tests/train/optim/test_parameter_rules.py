"""What trains by stages and rules, what decays, at which rates; and parameters that are copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from stage_setup import freeze_for_stage, make_groups
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.config.train_sections import OptimSection, ParameterRule
from onellm_dist.modalities import all_modalities
from onellm_dist.model.weights.lazy import open_model
from onellm_dist.train.optim.groups import build_parameter_groups, compute_group_rates
from onellm_dist.train.optim.part_summary import format_parts, summarise_parts, to_json
from onellm_dist.train.optim.parts import find_copies


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    from onellm_dist.model.presets import build_meta_model

    return build_meta_model("toy")


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def rule(match: str, **keys: Any) -> ParameterRule:
    return ParameterRule(match=match, **keys)


def test_align_trains_tokenizers_projectors_and_upm(toy: nn.Module) -> None:
    freeze_for_stage(toy, "align", set(all_modalities()))
    assert {name.split(".")[0] for name in trained(toy)} == {"tokenizers", "projectors", "upm"}
    assert {name for name, _ in toy.named_parameters()} - trained(toy) == {
        name for name, _ in toy.named_parameters() if name.startswith(("encoder.", "llm."))
    }


def test_parts_of_modalities_outside_the_mixture_are_frozen(toy: nn.Module) -> None:
    for stage, rules in (("align", ()), ("custom", [rule("tokenizers.*"), rule("projectors.*")])):
        freeze_for_stage(toy, stage, {"audio"}, parameters=rules)
        owned = (n for n in trained(toy) if n.startswith(("tokenizers", "projectors")))
        assert {name.split(".")[1] for name in owned} == {"audio"}


def test_tune_trains_the_llm_alone(toy: nn.Module) -> None:
    freeze_for_stage(toy, "tune", {"audio"})
    assert trained(toy) == {name for name, _ in toy.named_parameters() if name.startswith("llm.")}


def test_joint_trains_what_align_and_tune_do(toy: nn.Module) -> None:
    both = set()
    for stage in ("align", "tune"):
        freeze_for_stage(toy, stage, {"audio", "image"})
        both |= trained(toy)
    freeze_for_stage(toy, "joint", {"audio", "image"})
    assert trained(toy) == both
    freeze_for_stage(toy, "joint", set())
    assert {name.split(".")[0] for name in trained(toy)} == {"llm"}, "no medium reaches the UPM"


def test_nothing_to_train_is_refused(toy: nn.Module) -> None:
    with pytest.raises(UsageError, match="no dataset of the mixture has a modality"):
        freeze_for_stage(toy, "align", set())
    with pytest.raises(UsageError, match=r"nothing trains: by train\.stage=custom"):
        freeze_for_stage(toy, "custom", {"image"})
    with pytest.raises(UsageError, match="nothing trains"):
        freeze_for_stage(toy, "tune", set(), parameters=[rule("llm.*", freeze=True)])


def test_the_last_rule_decides_setting_by_setting(toy: nn.Module) -> None:
    plan = freeze_for_stage(
        toy,
        "tune",
        {"image"},
        parameters=[
            rule("llm.*", lr=0.5, schedule="linear"),
            rule("llm.model.layers.0.*", weight_decay=0.0),
            rule("*embed_tokens*", freeze=True),
            rule("encoder.blocks.1.*", lr=0.25),
        ],
        weight_decay=0.1,
    )
    first, head = "llm.model.layers.0.mlp.up_proj.weight", "llm.lm_head.weight"
    assert plan.rates[first] == (0.5, "linear", 0.0)
    assert plan.rates[head] == (0.5, "linear", 0.1)
    assert plan.rates["encoder.blocks.1.mlp.up.weight"] == (0.25, "cosine", 0.1)
    assert set(plan.rates) == trained(toy)
    assert "llm.model.embed_tokens.weight" not in plan.rates
    assert not any(name.startswith(("upm", "encoder.blocks.0")) for name in plan.rates)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (rule("llm.model.layer.*"), r"matches no parameter(.|\n)*llm\.model\.layers\.\*"),
        (rule("upm.experts.9.*"), r"matches no parameter(.|\n)*did you mean upm\.experts\.\*"),
        (rule("qqq"), r"matches no parameter(.|\n)*encoder, llm, projectors, tokenizers, upm"),
        (rule("projectors.*", layer_decay=0.9), "layer_decay and matches nothing in encoder"),
    ],
)
def test_a_rule_that_does_nothing_is_refused(
    toy: nn.Module, found: ParameterRule, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        freeze_for_stage(toy, "joint", {"image"}, parameters=[found])


def test_a_frozen_rule_has_no_rate() -> None:
    with pytest.raises(ValidationError, match=r"llm\.\* freezes, and sets lr"):
        rule("llm.*", freeze=True, lr=1.0)


def test_rates_fall_block_by_block(toy: nn.Module) -> None:
    """As in BEiT: the head has the full rate, the last block one factor less, and so on."""
    decayed = [rule(f"{part}.*", layer_decay=0.5) for part in ("llm", "upm", "encoder")]
    plan = freeze_for_stage(toy, "custom", {"image"}, parameters=decayed)
    scales = {name: rate.scale for name, rate in plan.rates.items()}
    config: Any = toy.config
    layers: int = config.text_config.num_hidden_layers
    assert scales["llm.lm_head.weight"] == scales["llm.model.norm.weight"] == 1.0
    for i in range(layers):
        own = {s for n, s in scales.items() if n.startswith(f"llm.model.layers.{i}.")}
        assert own == {0.5 ** (layers - i)}
    assert scales["llm.model.embed_tokens.weight"] == 0.5 ** (layers + 1)
    same = {s for n, s in scales.items() if ".blocks.0." in n and n.startswith("upm.experts.")}
    assert len(same) == 1, "the experts stand side by side"
    assert scales["encoder.patches.weight"] < scales["encoder.blocks.0.mlp.up.weight"]
    assert scales["encoder.ln_post.weight"] == 1.0


def test_groups_have_their_own_rates_in_each_step(toy: nn.Module) -> None:
    optim = OptimSection(lr=1.0, warmup_steps=2, weight_decay=0.1)
    rules = [rule("llm.*", lr=0.5, schedule="linear"), rule("llm.lm_head.*", lr=0.1)]
    plan = freeze_for_stage(toy, "joint", {"image"}, parameters=rules, weight_decay=0.1)
    groups = build_parameter_groups(toy, plan.rates)
    assert [g.rate.weight_decay for g in groups] == [0.1, 0.0, 0.1, 0.0, 0.1]
    rates = [group.rate for group in groups]
    assert compute_group_rates(0, optim, 12, rates) == [0.5, 0.5, 0.25, 0.25, 0.05]
    middle = compute_group_rates(7, optim, 12, rates)
    assert middle == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.05])
    assert compute_group_rates(3, optim, 12, rates)[0] > 0.9, "cosine, above the line"
    parts = summarise_parts(toy, optim, plan)
    lines = format_parts(parts)
    llm = next(line for line in lines if line.startswith("llm"))
    assert "0.1 to 0.5, linear" in llm and "biases, norms" in llm
    found = {part["part"]: part for part in to_json(parts)}
    assert found["llm"]["learning_rates"] == [0.1, 0.5]
    assert found["encoder"]["trained"] == 0 and found["encoder"]["learning_rates"] == []


def test_biases_and_rms_norms_do_not_decay(toy: nn.Module) -> None:
    plan = freeze_for_stage(toy, "align", set(all_modalities()))
    groups = make_groups(toy, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    parts = summarise_parts(toy, OptimSection(lr=0.1), plan)
    exempt = sum(p.numel() for p in groups[1]["params"])
    assert sum(dict(part.decays).get(0.0, 0) for part in parts) == exempt > 0
    assert sum(part.exempt for part in parts) == exempt
    names = {id(p): n for n, p in toy.named_parameters()}
    spared = {names[id(p)] for p in groups[1]["params"]}
    assert {n for n in trained(toy) if n.endswith("bias")} <= spared
    assert any("upm" in n and "norm" in n for n in spared)
    assert sum(len(g["params"]) for g in groups) == len(trained(toy))
    layer_norms = {f"{n}.weight" for n, m in toy.named_modules() if isinstance(m, nn.LayerNorm)}
    assert not layer_norms & spared


def test_new_modalities_start_from_image() -> None:
    model, _, weights = open_model(path=None, preset="toy", seed=0)
    before = {n: weights.rows(n, 0, p.shape[0]) for n, p in model.named_parameters()}
    copies = find_copies(model, "image", ["audio", "point"])
    assert copies and all(n.startswith(("projectors.audio.", "projectors.point.")) for n in copies)
    weights.copy(copies)
    for name, parameter in model.named_parameters():
        owner = name.split(".")[1]
        source = name.replace(f".{owner}.", ".image.", 1) if name in copies else name
        assert torch.equal(weights.rows(name, 0, parameter.shape[0]), before[source])
    with pytest.raises(UsageError, match="smell"):
        find_copies(model, "image", ["smell"])
