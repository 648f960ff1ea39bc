"""Fused norms, SwiGLU and rotary embedding in transformers' LLMs of any family.

A module is replaced only where a small twin of it, with random weights, computes what the fused
form computes. A family with other norms, MLPs or rotations keeps its own code.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from onellm_dist.model.kernels.activations import compute_silu_product
from onellm_dist.model.kernels.rms_norm import compute_rms_norm
from onellm_dist.model.kernels.rotary import rotate

CLOSE = 1e-6
"""Largest relative difference of a twin, in fp32."""
WIDTH = 8
ROTATION = "apply_rotary_pos_emb"
"""The function of transformers' modelling files that rotates queries and keys."""


def fuse_llm(llm: nn.Module) -> dict[str, int]:
    """Replace what has a fused form. Parameters, buffers and their names stay as they are.

    Args:
        llm: a causal LM of transformers; its parameters may be on the meta device.

    Returns:
        What was replaced: `rms_norm`, `swiglu` and `rotary`, each with its number of modules.
    """
    known: dict[tuple[type, str], bool] = {}
    found = {"rms_norm": 0, "swiglu": 0, "rotary": 0}
    for module in llm.modules():
        for name, (looks_like, equals, forward) in _FORMS.items():
            if not looks_like(module):
                continue
            key = type(module), name
            if key not in known:
                known[key] = equals(module)
            if known[key]:
                module.forward = MethodType(forward(module), module)
                found[name] += 1
    return found


def _looks_like_norm(module: nn.Module) -> bool:
    return (
        "RMSNorm" in type(module).__name__
        and [*module._parameters] == ["weight"]
        and not module._modules
        and _get_eps(module) is not None
    )


def _get_eps(module: Any) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(eps := getattr(module, name, None), float):
            return eps
    return None


def _run_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    eps = _get_eps(self)
    assert eps is not None
    return compute_rms_norm(hidden_states, self.weight, eps, fused=True)


def _norm_equals(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(_draw(generator, WIDTH))
    twin = _make_twin(module, parameters={"weight": weight})
    return _is_close(type(module).forward, _run_norm, twin, _draw_rows(generator))


def _looks_like_mlp(module: nn.Module) -> bool:
    return not module._parameters and set(module._modules) in (
        {"gate_proj", "up_proj", "down_proj", "act_fn"},
        {"gate_proj", "up_proj", "down_proj"},
    )


def _run_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    product = compute_silu_product(self.gate_proj(x), self.up_proj(x), fused=True)
    return self.down_proj(product)  # type: ignore[no-any-return]  # of a torch module


def _mlp_equals(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate_proj": (16, WIDTH), "up_proj": (16, WIDTH), "down_proj": (WIDTH, 16)}
    parts = {name: _Product(_draw(generator, *shape)) for name, shape in shapes.items()}
    if "act_fn" in module._modules:
        parts["act_fn"] = module._modules["act_fn"]  # type: ignore[assignment]  # any module
    twin = _make_twin(module, modules=parts)
    return _is_close(type(module).forward, _run_mlp, twin, _draw_rows(generator))


class _Product(nn.Module):
    """A linear layer on the CPU, whatever the default device is."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


def _get_forward(module: nn.Module) -> Any:
    """The forward of a module's class, without its decorators (transformers 5.24 has some)."""
    return inspect.unwrap(type(module).forward)


def _looks_rotary(module: nn.Module) -> bool:
    forward = _get_forward(module)
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and ROTATION in code.co_names
        and callable(forward.__globals__.get(ROTATION))
        and _can_replace(type(module).forward)
    )


def _can_replace(own: Any) -> bool:
    """Whether every decorator of a function is a function that calls the next one."""
    inner = getattr(own, "__wrapped__", None)
    if inner is None or not isinstance(own, FunctionType):
        return isinstance(own, FunctionType)
    return any(_holds(cell, inner) for cell in own.__closure__ or ()) and _can_replace(inner)


def _holds(cell: CellType, function: Any) -> bool:
    """Whether a variable of a closure is a function; one that is not assigned yet is none."""
    try:
        return cell.cell_contents is function
    except ValueError:
        return False


def _rotation_equals(module: nn.Module) -> bool:
    own = _get_forward(module).__globals__[ROTATION]
    if [*inspect.signature(own).parameters] != [*inspect.signature(rotate).parameters]:
        return False
    generator = torch.Generator().manual_seed(2)
    q, k = _draw(generator, 2, 4, 5, WIDTH), _draw(generator, 2, 2, 5, WIDTH)

    def flatten(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        return lambda _, *inputs: torch.cat([x.flatten() for x in function(*inputs)])[None]

    def agree(width: int) -> bool:
        # Angles of the two halves differ, so that a rotation of neighbouring pairs shows.
        cos, sin = (_draw(generator, 2, 5, width) for _ in "cs")
        return _is_close(flatten(own), flatten(rotate), None, q, k, cos, sin)

    return agree(WIDTH) and (not _takes_part(own, q, k) or agree(WIDTH // 2))


def _takes_part(own: Callable[..., Any], q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether a rotation takes angles for some channels of a head alone."""
    angles = torch.ones((2, 5, WIDTH // 2), device="cpu")
    try:
        own(q, k, angles, angles)
    except RuntimeError:
        return False
    return True


def _bind_rotation(module: nn.Module) -> Any:
    """The forward of the module's class, but with the fused rotation."""
    return _replace_rotation(type(module).forward)


@functools.cache
def _replace_rotation(own: Any) -> Any:
    """One function for all modules of a class, with a code object of its own.

    torch.compile keeps what it compiled with the code object, and names that in the globals of the
    function that it met first: another function of the same code would not find it there.
    """
    inner, names, cells = getattr(own, "__wrapped__", None), own.__globals__, own.__closure__
    if inner is None:
        names = {**names, ROTATION: rotate}
    else:  # a decorator: it stays around
        fused = _replace_rotation(inner)
        cells = tuple(CellType(fused) if _holds(c, inner) else c for c in cells or ())
    bound = FunctionType(own.__code__.replace(), names, own.__name__, own.__defaults__, cells)
    bound.__kwdefaults__ = own.__kwdefaults__
    return bound


def _make_twin(
    module: nn.Module,
    *,
    parameters: dict[str, nn.Parameter] | None = None,
    modules: dict[str, Any] | None = None,
) -> Any:
    """A module with other parameters and children, but all else as it is."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = parameters or {}
    twin.__dict__["_modules"] = modules or {}
    return twin


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _draw_rows(generator: torch.Generator) -> torch.Tensor:
    """[3, WIDTH]: small values, for which an epsilon counts, and large ones, which a limit cuts."""
    return _draw(generator, 3, WIDTH) * torch.tensor([[1e-3], [1.0], [100.0]], device="cpu")


def _is_close(
    own: Callable[..., Any], fused: Callable[..., Any], twin: Any, *inputs: torch.Tensor
) -> bool:
    """Whether two functions agree; one that cannot take these inputs does not."""
    try:
        with torch.no_grad():
            expected, found = own(twin, *inputs), fused(twin, *inputs)
    except Exception:  # code of any family, with attributes that the twin lacks
        return False
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    agree = (expected - found).abs().amax(-1) <= CLOSE * expected.abs().amax(-1)
    return bool(agree.all())


_FORMS: dict[str, tuple[Callable[..., bool], Callable[..., bool], Callable[..., Any]]] = {
    "rms_norm": (_looks_like_norm, _norm_equals, lambda module: _run_norm),
    "swiglu": (_looks_like_mlp, _mlp_equals, lambda module: _run_mlp),
    "rotary": (_looks_rotary, _rotation_equals, _bind_rotation),
}
"""Name -> (what may be one, whether its twin equals the fused form, its new forward)."""
