"""Frozen linear layers in float8 (e4m3): rounded row by row, multiplied in float8 where a GPU can.

Weights have a scale for each output, inputs one for each row, found anew in every use. Scales are
powers of two: a float8 value times its scale is exact in bf16, so that GPUs that multiply float8
and all others differ by the rounding of sums alone. (Tensor cores of Hopper keep some 14 bits of a
sum within a block, and torch adds these blocks in fp32: arXiv 2412.19437, section 3.3.2.) Gradients
pass through the rounded weight in the precision of the run, as if inputs were not rounded.

An element is rounded by at most 2^-4 of itself, or 2^-17 of the largest of its row if it is tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onellm_dist.model.kernels.pointwise import NAMESPACE, OPERATIONS, CompiledBody
from onellm_dist.model.quantised.base import QuantisedLinear, expand

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of e4m3."""
MULTIPLE = 16
"""Rows and columns of a weight are multiples of this where `torch._scaled_mm` multiplies it."""
LEAST_PEAK = 2.0**-60
"""Rows whose largest value is below this are scaled as if it were this."""
RELATIVE_ERROR, ROW_ERROR = 2.0**-4, 2.0**-17
"""Bounds of rounding: relative to the element, and to the largest of its row."""
_EXPONENT, _MANTISSA = 0x7F800000, 0x007FFFFF


class Float8Weight:
    """A weight [out, in] in float8, with a scale for each row.

    Args:
        values: [out, in], float8.
        scales: [out, 1], fp32.
        dtype: the precision of the run.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        self.values = values
        self.scales = scales
        self.dtype = dtype

    def dequantize(self) -> torch.Tensor:
        """The rounded weight in the precision of the run; exact in bf16 and fp32."""
        return _expand_rows(self.values, self.scales, self.dtype)


class Float8Linear(QuantisedLinear):
    """A frozen linear layer in float8.

    Args:
        linear: the layer that it stands for; only its sizes and its bias are used.
        weight: its weight.
        read_base: reads all of the weight that was rounded.
        in_float8: whether products are of float8 values; None: where the device can.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight: Float8Weight,
        read_base: Callable[[], torch.Tensor],
        in_float8: bool | None = None,
    ) -> None:
        super().__init__(linear, weight, read_base)
        if in_float8 is None:
            in_float8 = choose_products(weight.values.device, weight.dtype)[0]
        self.in_float8 = in_float8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer. `x` is [..., in], the result [..., out]."""
        product: torch.Tensor = _Float8Product.apply(x, self._held, self.in_float8)
        return product if self.bias is None else product + self.bias


class _Float8Product(torch.autograd.Function):
    """`x @ weight.T` of rounded inputs; it keeps nothing for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, held: Float8Weight, in_float8: bool) -> torch.Tensor:
        ctx.held = held
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        values, scales = round_rows(rows)
        if in_float8 and len(rows):
            out = multiply_rows((values, scales), (held.values, held.scales), held.dtype)
        else:
            out = functional.linear(_expand_rows(values, scales, held.dtype), expand(held))
        return out.view(*x.shape[:-1], len(held.values))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] @ expand(ctx.held), None, None


def choose_products(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a device multiplies float8 values, and why.

    Args:
        device: the device that computes.
        dtype: the precision of the run.
    """
    if device.type != "cuda":
        return False, "no CUDA device"
    if torch.version.hip is not None:
        return False, "AMD GPUs have float8 of other kinds"
    major, minor = torch.cuda.get_device_capability(device)
    found = f"compute capability {major}.{minor}"
    if (major, minor) < (8, 9):  # as torch._scaled_mm says (torch 2.15)
        return False, f"{found}, and float8 products need 8.9"
    if dtype != torch.bfloat16:  # rows with scales of their own give bf16 alone
        return False, "train.precision is not bf16"
    return True, found


def describe_products(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies float8 weights on a device, for people.

    Args:
        device: as of `choose_products`.
        dtype: as of `choose_products`.
    """
    can, reason = choose_products(device, dtype)
    if can:
        return f"multiplied in float8 ({reason})"
    return f"rounded to float8 and multiplied in the precision of the run ({reason})"


def try_products(device: torch.device, dtype: torch.dtype) -> None:
    """Run a small layer once, forward and backward.

    Args:
        device: as of `choose_products`.
        dtype: as of `choose_products`.

    Raises:
        RuntimeError: the device cannot run it, or gives another result than 2 * MULTIPLE.
    """
    linear = nn.Linear(MULTIPLE, MULTIPLE, bias=False)
    weight = torch.ones((MULTIPLE, MULTIPLE), dtype=dtype, device=device)
    layer = Float8Linear(linear, round_weight(weight), lambda: weight)
    x = torch.full((2, MULTIPLE), 2.0, dtype=dtype, device=device, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    if not bool((out == 2 * MULTIPLE).all()):
        raise RuntimeError("a product of ones and twos is wrong")


def round_weight(values: torch.Tensor) -> Float8Weight:
    """Round a weight [out, in]; its dtype is the precision of the run."""
    return Float8Weight(*_round_rows(values), values.dtype)


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of [N, D] to float8 with a scale of its own.

    Returns:
        (values [N, D] in float8, scales [N, 1] in fp32, powers of two). A row with a value that is
        not finite has a NaN.
    """
    values, scales = OPERATIONS.float8_rows(x)
    return values, scales


def multiply_rows(
    left: tuple[torch.Tensor, torch.Tensor],
    right: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """`left @ right.T` in float8, with sums of blocks added in fp32.

    Args:
        left: values [N, D] and scales [N, 1] of `round_rows`.
        right: likewise, [M, D] and [M, 1].
        dtype: of the result [N, M].
    """
    return torch._scaled_mm(
        left[0], right[0].t(), scale_a=left[1], scale_b=right[1].t(), out_dtype=dtype
    )


def make_plan_weight(weight: torch.Tensor, dtype: torch.dtype) -> Float8Weight:
    """A weight without values, on the meta device.

    Args:
        weight: the weight that would be rounded.
        dtype: the precision of the run.
    """
    return Float8Weight(*_make_rows(weight.to("meta")), dtype)


def _expand_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype) * scales.to(dtype)


def _round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    peaks = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST_PEAK) / LARGEST
    # Up to a power of two by its bits: log2 and exp2 of a GPU need not be exact.
    bits = (peaks.view(torch.int32) + _MANTISSA) & _EXPONENT
    scales = bits.view(torch.float32)
    return (wide / scales).to(FLOAT8), scales


def _make_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=FLOAT8), x.new_empty((len(x), 1), dtype=torch.float32)


def _round_on_gpu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Inductor has no float8 for older GPUs, and would be given up for all kernels.
    body = _COMPILED if choose_products(x.device, torch.bfloat16)[0] else _round_rows
    found: tuple[torch.Tensor, torch.Tensor] = body(x)
    return found


_COMPILED = CompiledBody(_round_rows)
_NAME = f"{NAMESPACE}::float8_rows"
torch.library.define(_NAME, "(Tensor x) -> (Tensor, Tensor)")
torch.library.impl(_NAME, "cpu", _round_rows)
torch.library.impl(_NAME, "cuda", _round_on_gpu)
torch.library.register_fake(_NAME, _make_rows)
