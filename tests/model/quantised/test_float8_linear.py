"""Frozen linear layers in float8: bounds of their rounding, what computes them, what stays out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from packs import make_pack, relative, small_model
from plain_float8 import round_plainly, use_plain_float8
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import EngineSection
from onellm_dist.config.train_sections import LoraSection, TrainSection
from onellm_dist.diagnostics.software_checks import check_float8
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.quantised.base import expand
from onellm_dist.model.quantised.float8 import (
    RELATIVE_ERROR,
    ROW_ERROR,
    Float8Linear,
    choose_products,
    round_rows,
    round_weight,
)
from onellm_dist.model.quantised.linear import find_layers, list_quantised, plan_layers
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.planner.cost_model import build_cost_model
from onellm_dist.planner.counting import FLOAT8_PRODUCT, count_pack
from onellm_dist.planner.hardware import get_gpu_kind
from onellm_dist.planner.pack_shapes import SampleShape, make_meta_batch, measure_sizes
from onellm_dist.planner.run_plan import get_modalities
from onellm_dist.planner.time import DeviceClock
from onellm_dist.train.engine.frozen_weights import check_frozen_weights
from onellm_dist.train.recipe_summary.parameters import describe_frozen_weights

needs_scales_of_rows = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.15"),
    reason="torch's float8 product on processors has one scale a tensor (2.11), not one a row",
)
"""We use it on GPUs alone, where it has had scales of rows for longer."""
EXACT = 1e-6
STEPS, TOY_GAP, TOY_MEAN = 200, 0.05, 0.01
"""Largest and mean difference of a loss within so many steps of the tiny model, relative."""


def make_layer(
    inputs: int, outputs: int, dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[nn.Linear, Float8Linear]:
    linear = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    weight = linear.weight.data
    return linear, Float8Linear(linear, round_weight(weight), lambda: weight, **how)


def bound_rounding(x: torch.Tensor) -> torch.Tensor:
    """The most by which each element may be rounded."""
    own = x.double().abs()
    return torch.maximum(RELATIVE_ERROR * own, ROW_ERROR * own.amax(-1, keepdim=True))


def test_rounding_stays_within_its_bounds_and_expands_exactly() -> None:
    torch.manual_seed(0)
    sizes = torch.logspace(-12, 12, 64)[:, None]
    x = torch.randn(64, 512) * sizes * torch.logspace(-8, 0, 512)
    x[5] = 0.0
    x[6] = 448.0 * 2.0**-9  # the largest value of e4m3 times a scale: nothing is lost
    values, scales = round_rows(x)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    found = values.double() * scales.double()
    assert ((found - x.double()).abs() <= bound_rounding(x)).all()
    assert torch.equal(found, round_plainly(x).double())
    assert torch.equal(found[6], x[6].double()) and not found[5].any()
    for dtype in (torch.bfloat16, torch.float32):
        weight = round_weight(x.to(dtype))
        expected = round_plainly(x.to(dtype).double()).to(dtype)
        assert torch.equal(expand(weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_stay_within_their_bounds(dtype: torch.dtype) -> None:
    """Of the exact product of unrounded values; products of rounded ones add one rounding."""
    torch.manual_seed(1)
    linear, layer = make_layer(512, 160, dtype)
    x = torch.randn(3, 40, 512).to(dtype).requires_grad_()
    gradient = torch.randn(3, 40, 160).to(dtype)
    out = layer(x)
    out.backward(gradient)
    own, weight, bias = x.detach().double(), linear.weight.double(), linear.bias.double()
    exact = own @ weight.T + bias
    ex, ew = bound_rounding(own), bound_rounding(weight)
    most = ex @ weight.abs().T + own.abs() @ ew.T + ex @ ew.T
    last = 4 * torch.finfo(dtype).eps
    size = own.abs() @ weight.abs().T + bias.abs()
    assert ((out.double() - exact).abs() <= most + last * size).all()
    assert x.grad is not None
    wanted, given = gradient.double() @ weight, x.grad.double()
    size = gradient.double().abs() @ weight.abs()
    assert ((given - wanted).abs() <= gradient.double().abs() @ ew + last * size).all()
    pairs = (out.detach().double(), exact), (given, wanted)
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    print(f"{dtype}: relative error of a product {errors[0]:.4f}, of a gradient {errors[1]:.4f}")
    assert 1e-3 < errors[0] < 0.05 and 1e-3 < errors[1] < 0.035


@needs_scales_of_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_products_are_those_of_the_twin(dtype: torch.dtype) -> None:
    """torch multiplies float8 on processors too, as on GPUs: it sums in fp32 and rounds once."""
    torch.manual_seed(2)
    linear, twin = make_layer(96, 48, dtype)
    weight = linear.weight.data
    layer = Float8Linear(linear, round_weight(weight), lambda: weight, in_float8=True)
    assert not twin.in_float8
    bound = EXACT if dtype == torch.float32 else 2.0**-7
    for shape in ((7, 96), (2, 5, 96), (1, 96), (0, 96)):
        x = torch.randn(shape).to(dtype)
        ours, other = (x.clone().requires_grad_() for _ in range(2))
        given, wanted = layer(ours), twin(other)
        assert given.shape == wanted.shape == (*shape[:-1], 48) and given.dtype == dtype
        for out in (given, wanted):
            out.sum().backward()
        assert ours.grad is not None and other.grad is not None
        assert torch.equal(ours.grad, other.grad)
        if x.numel():
            assert relative(given.detach(), wanted.detach()) <= bound


@pytest.mark.parametrize("in_float8", [False, pytest.param(True, marks=needs_scales_of_rows)])
def test_rows_that_are_not_finite_stay_so_and_others_do_not_change(in_float8: bool) -> None:
    _, layer = make_layer(32, 16, in_float8=in_float8)
    x = torch.randn(4, 32)
    expected = layer(x)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    found = layer(x)
    assert found[1:3].isnan().all()
    assert torch.equal(found[[0, 3]], expected[[0, 3]])


def make_adapted(modalities: Sequence[str] = ("image", "imu")) -> Any:
    model: Any = small_model(modalities=modalities)
    torch.manual_seed(0)
    add_adapters(model, LoraSection(rank=2, targets=("llm.*q_proj",)))
    return model


def hold_in_float8(model: Any, dtype: torch.dtype = torch.float32) -> None:
    """What `quantise_layers` does, from the model's own values."""
    for name, layer in find_layers(model, "fp8").items():
        parent, _, own = name.rpartition(".")
        weight = layer.weight.data.to(dtype)
        held = Float8Linear(layer, round_weight(weight), partial(lambda w: w, weight))
        setattr(model.get_submodule(parent), own, held)


def test_what_is_rounded_is_said_as_a_share_of_the_llms_frozen_weights() -> None:
    """Of a mixture of experts it is attention alone: its experts are not linear layers."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=16,
    )
    with torch.device("meta"):
        llm: Any = MixtralForCausalLM(config)
    model: Any = nn.ModuleDict({"llm": llm.requires_grad_(False)})
    model.get_output_embeddings = llm.get_output_embeddings
    layers = find_layers(model, "fp8")
    assert {name.split(".")[-2] for name in layers} == {"self_attn"} and len(layers) == 4
    attention = 2 * 64 * 64 + 2 * 64 * 32
    others = 64 * 16 + 16 * 3 * 64 * 48 + 3 * 64 + 2 * 512 * 64  # router, experts, norms, ends
    recipe: Any = SimpleNamespace(
        engine=EngineSection(frozen_weights="fp8"), train=SimpleNamespace(precision="fp32")
    )
    (line,) = describe_frozen_weights(recipe, model.requires_grad_(False))
    share = attention / (attention + others)
    assert 0.03 < share < 0.1 and f"4 linear layers of the LLM ({share:.1%} of its frozen" in line


def test_what_gpus_do_not_multiply_and_routers_stay_out() -> None:
    model = make_adapted()
    chosen, all_layers = find_layers(model, "fp8"), find_layers(model, "int8")
    left_out = all_layers.keys() - chosen.keys()  # 2 of 4 heads: 24 rows
    assert {name.split(".")[-1] for name in left_out} == {"k_proj", "v_proj"}
    assert len(chosen) == 2 * 5 and "llm.model.layers.0.self_attn.q_proj.base_layer" in chosen
    layers = nn.ModuleDict(
        {
            "gate": nn.Linear(32, 64),
            "router": nn.ModuleDict({"layer": nn.Linear(32, 64)}),
            "gate_proj": nn.Linear(32, 64),  # as wide as there are experts, and no router
            "other": nn.Linear(32, 48),
        }
    )
    other: Any = nn.ModuleDict({"llm": layers.requires_grad_(False)})
    other.get_output_embeddings = lambda: None
    other.config = SimpleNamespace(text_config=SimpleNamespace(num_experts=64))
    assert list(find_layers(other, "fp8")) == ["llm.gate_proj", "llm.other"]
    del layers["other"], layers["gate_proj"]
    with pytest.raises(UsageError, match="no frozen linear layer with sizes that divide by 16"):
        plan_layers(other, "fp8")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_computes_and_trains_as_its_plain_definition(recompute: str) -> None:
    given, wanted = make_adapted(), make_adapted()
    enable_activation_checkpointing(given, recompute)
    hold_in_float8(given)
    use_plain_float8(wanted.llm)
    pack = make_pack([("image",), ("imu",), ()], [7, 9, 5])
    losses = [model(packed=pack).loss for model in (given, wanted)]
    for loss in losses:
        loss.backward()
    given_loss, wanted_loss = (float(loss.detach()) for loss in losses)
    assert given_loss == pytest.approx(wanted_loss, rel=EXACT)
    others = dict(wanted.named_parameters())
    trained = [(n, p) for n, p in given.named_parameters() if p.grad is not None]
    assert any(".lora_" in name for name, _ in trained)
    for name, parameter in trained:
        other = others[name].grad
        assert parameter.grad is not None and other is not None
        if other.abs().max() > 1e-9:
            assert relative(parameter.grad, other) < 1e-4, name


@pytest.mark.soak
def test_losses_of_200_steps_stay_near_those_over_plain_weights() -> None:
    """Tiny, in bf16: adapters and projector train on eight packs that come again."""
    found = []
    for rounded in (False, True):
        model = make_adapted(["imu"])
        model.llm.to(torch.bfloat16)
        if rounded:
            hold_in_float8(model, torch.bfloat16)
        model.to(torch.bfloat16)
        found.append(train(model))
    gaps = [abs(a - b) / b for a, b in zip(found[1], found[0], strict=True)]
    print(
        f"loss {found[0][0]:.3f} to {found[0][-1]:.3f}; in float8 to {found[1][-1]:.3f}: "
        f"largest gap {max(gaps):.2%}, mean {sum(gaps) / STEPS:.2%}"
    )
    assert found[0][-1] < 0.9 * found[0][0]
    assert 0 < max(gaps) < TOY_GAP and sum(gaps) / STEPS < TOY_MEAN


def train(model: Any) -> list[float]:
    masters = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in masters.values()], lr=4e-3)
    own = dict(model.named_parameters())
    losses = []
    for step in range(STEPS):
        pack = make_pack([("imu",), ()], [12, 15], step % 8)
        loss = model(packed=pack).loss / 25
        loss.backward()
        for name, master in masters.items():
            grad = own[name].grad
            master.grad = torch.zeros_like(master) if grad is None else grad.float()
            own[name].grad = None
        optimizer.step()
        for name, master in masters.items():
            own[name].data.copy_(master)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        ((8, 0), torch.bfloat16, "compute capability 8.0, and float8 products need 8.9"),
        ((9, 0), torch.float32, "train.precision is not bf16"),
        ((8, 9), torch.bfloat16, None),
        ((9, 0), torch.bfloat16, None),
        ((12, 0), torch.bfloat16, None),
    ],
)
def test_gpus_without_float8_products_say_so(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    words: str | None,
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    can, reason = choose_products(torch.device("cuda", 0), dtype)
    assert can == (words is None) and (words or "compute capability") in reason


def test_doctor_and_recipe_need_no_torchao() -> None:
    if not torch.cuda.is_available():
        found = check_float8()
        assert found.state == "ok" and "no CUDA device" in found.detail
    train = TrainSection(stage="align", steps=1)
    check_frozen_weights(EngineSection(frozen_weights="fp8"), train)
    with pytest.raises(UsageError, match="the LLM trains"):
        check_frozen_weights(
            EngineSection(frozen_weights="fp8"), TrainSection(stage="tune", steps=1)
        )


def plan_model(in_float8: bool | None) -> Any:
    """On the meta device; None: plain."""
    model = make_adapted().to(torch.bfloat16).to("meta")
    if in_float8 is not None:
        plan_layers(model, "fp8", in_float8=in_float8)
    return model


@pytest.mark.seconds
def test_the_planner_knows_float8_products_and_their_rate() -> None:
    models = {how: plan_model(how) for how in (None, False, True)}
    modalities = get_modalities(models[None].config)
    shapes = (SampleShape(("image",), 4000, 3999),) * 8
    batch = make_meta_batch(shapes, list(modalities.values()))
    counts = {how: count_pack(model, batch) for how, model in models.items()}
    flops = {how: sum(work.flops for work in c.operations.values()) for how, c in counts.items()}
    assert flops[True] == flops[False] == flops[None]
    products = [key for key in counts[True].operations if key.name == FLOAT8_PRODUCT]
    assert len(products) == 2 * 5 and {key.phase for key in products} == {"forward"}
    assert not any(key.name == FLOAT8_PRODUCT for key in counts[False].operations)
    # Held weights are not activations, and nothing more is kept for backward.
    assert sum(counts[True].kept.values()) <= sum(counts[None].kept.values())
    seconds = {}
    costs = build_cost_model(models[True], [("image",)], modalities)
    for name, peaks in (("fast", {"fp8": 1e6}), ("slow", {"fp8": 1.0}), ("none", {})):
        kind = get_gpu_kind("h100")
        kind = kind.model_copy(update={"peak_tflops": {"bf16": 100.0, "fp32": 50.0, **peaks}})
        assert kind.multiplies_float8("bf16") == bool(peaks) and not kind.multiplies_float8("fp32")
        clock = DeviceClock(costs, kind, "bf16")
        seconds[name] = clock.measure(measure_sizes(shapes, modalities)).forward
    assert seconds["fast"] < seconds["none"] < seconds["slow"]
    held = list_quantised(models[True]).values()
    assert {x.dtype for layer in held for x in layer.list_held()} == {
        torch.float8_e4m3fn,
        torch.float32,
    }
