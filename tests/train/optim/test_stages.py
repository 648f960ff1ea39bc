"""What trains in a stage, what decays, and which parameters start as copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import all_modalities
from onellm_dist.model.lazy_weights import open_model
from onellm_dist.train.optim.stages import build_parameter_groups, find_copies, freeze_for_stage


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    from onellm_dist.model.presets import build_meta_model

    return build_meta_model("toy")


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_align_trains_tokenizers_projectors_and_upm(toy: nn.Module) -> None:
    freeze_for_stage(toy, "align", set(all_modalities()))
    assert {name.split(".")[0] for name in trained(toy)} == {"tokenizers", "projectors", "upm"}
    assert {name for name, _ in toy.named_parameters()} - trained(toy) == {
        name for name, _ in toy.named_parameters() if name.startswith(("encoder.", "llm."))
    }


def test_parts_of_modalities_outside_the_mixture_are_frozen(toy: nn.Module) -> None:
    freeze_for_stage(toy, "align", {"audio"})
    owners = {
        name.split(".")[1] for name in trained(toy) if name.startswith(("tokenizers", "projectors"))
    }
    assert owners == {"audio"}


def test_tune_trains_the_llm_alone(toy: nn.Module) -> None:
    freeze_for_stage(toy, "tune", {"audio"})
    assert trained(toy) == {name for name, _ in toy.named_parameters() if name.startswith("llm.")}


def test_align_on_text_alone_is_refused(toy: nn.Module) -> None:
    with pytest.raises(UsageError):
        freeze_for_stage(toy, "align", set())


def test_biases_and_rms_norms_do_not_decay(toy: nn.Module) -> None:
    freeze_for_stage(toy, "align", set(all_modalities()))
    groups = build_parameter_groups(toy, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
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
