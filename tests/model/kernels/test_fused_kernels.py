"""Every fused kernel against its plain twin: values, gradients, what is kept, what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from onellm_dist.model.kernels import cross_entropy, pointwise
from onellm_dist.model.kernels.activations import compute_quick_gelu, compute_silu_product
from onellm_dist.model.kernels.cross_entropy import compute_chunked_cross_entropy
from onellm_dist.model.kernels.pointwise import CompiledBody
from onellm_dist.model.kernels.rms_norm import compute_rms_norm
from onellm_dist.model.kernels.rotary import rotate

Pair = tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]
FP32 = 1e-6
BF16 = 2.0**-6
"""Four units in the last place: both round, at different places."""


def gate(fused: bool) -> Callable[..., torch.Tensor]:
    return lambda a, b: compute_silu_product(a, b, fused=fused)


def quick(fused: bool) -> Callable[..., torch.Tensor]:
    return lambda x: compute_quick_gelu(x, fused=fused)


def norm(fused: bool) -> Callable[..., torch.Tensor]:
    return lambda x, weight: compute_rms_norm(x, weight, 1e-5, fused=fused)


def turn(function: Callable[..., Any], angles: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), *angles)
        return torch.cat([x.flatten() for x in out])

    return run


def make_case(name: str, rows: int, width: int, dtype: torch.dtype) -> Pair:
    """(fused, plain, inputs)."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(2).to(dtype)

    if name == "swiglu":
        return gate(True), gate(False), [draw(rows, width), draw(rows, width)]
    if name == "quick_gelu":
        return quick(True), quick(False), [draw(rows, width)]
    if name == "rms_norm":
        return norm(True), norm(False), [draw(1, rows, width), draw(width)]
    angle = torch.rand((1, rows, width), generator=generator) * 6.3
    angles = [angle.cos().to(dtype), angle.sin().to(dtype)]
    heads = draw(1, rows, 4, 2 * width)[..., :width], draw(1, rows, 2, width)
    return turn(rotate, angles), turn(apply_rotary_pos_emb, angles), list(heads)


def run_both(pair: Pair) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Values and gradients of the two, by pairs."""
    fused, plain, inputs = pair
    results = []
    for function in (fused, plain):
        own = [x.clone().requires_grad_() for x in inputs]
        out = function(*own)
        upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, own, upstream)])
    yield from zip(*results, strict=True)


def check_close(pair: Pair, bound: float) -> None:
    for found, expected in run_both(pair):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if expected.numel():
            largest = expected.abs().max().clamp_min(1e-3).float()
            assert (found - expected).abs().max().float() <= bound * largest


@pytest.mark.parametrize("name", ["swiglu", "quick_gelu", "rms_norm", "rotary"])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), half=st.integers(1, 24))
def test_fused_equals_plain(name: str, rows: int, half: int) -> None:
    check_close(make_case(name, rows, 2 * half, torch.float32), FP32)
    check_close(make_case(name, rows, 2 * half, torch.bfloat16), BF16)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 30), words=st.integers(2, 60), chunk=st.integers(1, 200))
def test_cross_entropy_in_chunks_equals_torch_s(rows: int, words: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(-1, words, (rows,), generator=generator)
    targets[targets < 0] = -100  # rows without a loss
    logits = torch.randn((rows, words), generator=generator) * 8
    before, cross_entropy.CHUNK_ELEMENTS = cross_entropy.CHUNK_ELEMENTS, chunk
    try:
        for dtype, bound in ((torch.float32, FP32), (torch.bfloat16, 2.0**-8)):
            check_close(
                (
                    lambda x: compute_chunked_cross_entropy(x, targets),
                    lambda x: F.cross_entropy(x.float(), targets, reduction="none"),
                    [logits.to(dtype)],
                ),
                bound,
            )
    finally:
        cross_entropy.CHUNK_ELEMENTS = before


@pytest.mark.parametrize("target", [-1, -99, -101, 8, 2**40])
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_a_target_that_is_no_word_is_refused(
    monkeypatch: pytest.MonkeyPatch, target: int, chunk: int
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    logits, targets = torch.randn(3, 8), torch.tensor([7, -100, target])
    for wants_gradient in (False, True):
        with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
            compute_chunked_cross_entropy(logits.requires_grad_(wants_gradient), targets)


def test_extreme_logits_have_finite_losses_and_a_nan_stays_one() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [torch.nan, 0.0, 0.0]], requires_grad=True)
    nll = compute_chunked_cross_entropy(logits, torch.tensor([1, 1]))
    expected = F.cross_entropy(logits, torch.tensor([1, 1]), reduction="none")
    assert torch.equal(nll[:1], expected[:1]) and nll[0] == 2e4 and nll[1].isnan()


def count_kept(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> int:
    """Bytes of what forward keeps for backward, inputs included."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = [x.clone().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*own)
    total = sum(kept.values())
    del out
    return total


@pytest.mark.parametrize("name", ["swiglu", "quick_gelu"])
def test_fused_keeps_its_inputs_alone(name: str) -> None:
    fused, plain, inputs = make_case(name, 64, 32, torch.bfloat16)
    assert count_kept(fused, inputs) == sum(x.nbytes for x in inputs)
    assert count_kept(plain, inputs) > sum(x.nbytes for x in inputs)


def test_cross_entropy_keeps_no_wide_copy_of_the_logits() -> None:
    logits, targets = torch.randn(64, 500).bfloat16(), torch.arange(64)
    kept = count_kept(lambda x: compute_chunked_cross_entropy(x, targets), [logits])
    plain = count_kept(lambda x: F.cross_entropy(x.float(), targets, reduction="none"), [logits])
    assert kept < 1.05 * logits.nbytes < 0.55 * plain


@pytest.mark.parametrize("name", ["swiglu", "quick_gelu", "rms_norm", "rotary"])
def test_who_watches_sees_one_operation_each_way_and_the_same_numbers(name: str) -> None:
    fused, _, inputs = make_case(name, 7, 8, torch.float32)

    def run() -> list[torch.Tensor]:
        own = [x.clone().requires_grad_() for x in inputs]
        out = fused(*own)
        return [out.detach(), *torch.autograd.grad(out, own, torch.ones_like(out))]

    alone = run()
    with Names() as names:
        watched = run()
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    ours = [each for each in names.seen if each.startswith("onellm::")]
    assert len(ours) == 2 and ours[1].startswith(f"{ours[0]}_backward")
    assert not {"aten::rsqrt", "aten::silu", "aten::sigmoid", "aten::neg"} & {*names.seen}


@pytest.mark.parametrize("trains", [False, True])
def test_the_norm_of_a_frozen_weight_has_the_same_gradient_of_its_input(trains: bool) -> None:
    _, _, (x, weight) = make_case("rms_norm", 5, 12, torch.float32)
    found = []
    for fused in (True, False):
        own, scale = x.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        compute_rms_norm(own, scale, 1e-5, fused=fused).square().sum().backward()
        assert own.grad is not None and (scale.grad is not None) == trains
        found.append(own.grad)
    assert (found[0] - found[1]).abs().max() <= FP32 * found[1].abs().max()


def test_the_norm_of_one_row_without_other_dimensions_has_the_same_gradients() -> None:
    _, _, (x, weight) = make_case("rms_norm", 1, 12, torch.float32)
    check_close((norm(True), norm(False), [x[0, 0], weight]), FP32)


class Dropped(torch.autograd.Function):
    """Passes values on, and no gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


FUSED = ["swiglu", "quick_gelu", "rms_norm", "frozen_rms_norm", "rotary", "cross_entropy"]


def make_fused(name: str) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """(fused, inputs), which want gradients."""
    if name == "cross_entropy":
        logits = torch.randn((5, 8), generator=torch.Generator().manual_seed(0))
        targets = torch.arange(5)
        return lambda x: compute_chunked_cross_entropy(x, targets), [logits.requires_grad_()]
    if name == "frozen_rms_norm":
        fused, _, (x, weight) = make_case("rms_norm", 5, 8, torch.float32)
        return lambda x: fused(x, weight), [x.requires_grad_()]
    fused, _, inputs = make_case(name, 5, 8, torch.float32)
    return fused, [x.clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize("name", [name for name in FUSED if name != "rotary"])
def test_without_a_gradient_of_the_result_the_inputs_get_none_or_zero(name: str) -> None:
    fused, own = make_fused(name)
    drop: Any = Dropped.apply
    drop(fused(*own)).sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in own)


@pytest.mark.parametrize("name", FUSED)
def test_a_second_derivative_is_refused(name: str) -> None:
    fused, own = make_fused(name)
    first = torch.autograd.grad(fused(*own).square().sum(), own, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.stack([gradient.square().sum() for gradient in first]).sum().backward()


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("position", [0, -1])
def test_a_forward_mode_derivative_is_refused_with_and_without_gradients(
    name: str, position: int
) -> None:
    fused, own = make_fused(name)
    out = fused(*own)
    with torch.autograd.forward_ad.dual_level():
        inputs = [x.detach() for x in own]
        with torch.no_grad():  # a level that is open, and inputs that have no tangents
            assert torch.equal(fused(*inputs), out)
        inputs[position] = make_dual(inputs[position])
        for gradients in (False, True):
            with (
                torch.set_grad_enabled(gradients),
                pytest.raises(NotImplementedError, match=r"jvp|no forward-mode derivative"),
            ):
                fused(*inputs)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.autograd.grad(out, own, make_dual(torch.ones_like(out)))


def make_dual(x: torch.Tensor) -> torch.Tensor:
    dual: torch.Tensor = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
    return dual


class Names(TorchDispatchMode):
    """Keeps the names of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bodies are compiled on the CPU too, and anew."""
    monkeypatch.setattr(pointwise, "COMPILED_DEVICES", {"cpu"})
    monkeypatch.setattr(CompiledBody, "failure", None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiled_here")
def test_what_cannot_be_compiled_runs_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        def run(*_: torch.Tensor) -> Any:
            raise torch._dynamo.exc.TorchDynamoException("no C compiler\nat all")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    x = torch.randn(4, 6)
    found = [CompiledBody(torch.neg)(x) for _ in range(2)]
    assert all(torch.equal(y, -x) for y in found)
    assert CompiledBody.failure == "TorchDynamoException: no C compiler"
    assert caplog.text.count("no C compiler") == 1


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.seconds
def test_a_function_that_is_compiled_too_often_runs_as_it_is_written_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled, compile_body = [0], torch.compile

    def trace(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        compiled[0] += 1
        return graph.forward

    def compile_without_c(body: Any, **keys: Any) -> Any:
        return compile_body(body, backend=trace, **keys)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    monkeypatch.setattr(torch, "compile", compile_without_c)
    bodies, x = (CompiledBody(double), CompiledBody(lambda x: x - 1)), torch.randn(4, 6)
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
            assert torch.equal(bodies[0](x.to(dtype)), x.to(dtype) * 2)
        assert compiled == [1] and caplog.text.count("double: too many kinds") == 1
        assert torch.equal(bodies[1](x), x - 1) and compiled == [2]
    assert CompiledBody.failure is None


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("name", ["swiglu", "quick_gelu", "rotary"])
def test_compiled_kernels_equal_plain_and_are_not_compiled_for_new_shapes(name: str) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    for rows in range(3, 53):
        check_close(make_case(name, rows, 2 * (rows % 7 + 4), torch.float32), FP32)
    assert CompiledBody.failure is None
    # Forward and backward; the strides of queries that are views may ask for another one each.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
