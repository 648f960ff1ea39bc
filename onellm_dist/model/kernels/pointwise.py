"""Fused elementwise operations: one kernel in place of several, and less is kept for backward.

Each is an operation of torch's own registry (`onellm::name`), so that selective recomputation and
the planner, which counts on the meta device, see one operation. Forward and backward are written in
plain torch: on a GPU inductor compiles each of them to one kernel, for all shapes at once;
elsewhere, and where it cannot (no C compiler), they run as they are written. There are no second
derivatives and none in forward mode: asked for one, they raise NotImplementedError; the plain twins
have them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.logging import get_logger

log = get_logger(__name__)
PACKAGE = "onellm_dist."
NAMESPACE = (
    "onellm"
    if __name__.startswith(PACKAGE)
    else f"onellm_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"
)
"""Namespace of the operations. A name is taken once: copies of this code in model folders have
their own."""
OPERATIONS: Any = getattr(torch.ops, NAMESPACE)
COMPILED_DEVICES = {"cuda"}
"""Types of the devices on which the operations are compiled."""
Body = Callable[..., Any]
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class CompiledBody:
    """A function of tensors that inductor compiles on a GPU.

    Args:
        body: the function; elementwise, without side effects.
    """

    failure: str | None = None
    """Why the functions cannot be compiled here; None: nothing has failed."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._compiled: Body | None = None
        self._is_limited = False

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run the function, without gradients."""
        if CompiledBody.failure is None and not self._is_limited and _is_compiled_for(tensors[0]):
            return self._run_compiled(*tensors)
        return self._body(*tensors)

    def _run_compiled(self, *tensors: torch.Tensor) -> Any:
        # Their import takes a second.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if self._compiled is None:
            self._compiled = torch.compile(self._body, dynamic=True, fullgraph=True)
        try:
            with torch.no_grad():
                return self._compiled(*(tensor.detach() for tensor in tensors))
        except FailOnRecompileLimitHit:  # of this function alone
            self._is_limited = True
            name = getattr(self._body, "__name__", "?")
            log.warning("fused kernel %s: too many kinds of inputs, it runs unfused", name)
            return self._body(*tensors)
        except TorchDynamoException as error:
            reason = get_first_line(error)
            CompiledBody.failure = f"{type(error).__name__}: {reason}"
            log.warning("fused kernels are not compiled here, and run unfused: %s", reason)
            return self._body(*tensors)


def _is_compiled_for(tensor: torch.Tensor) -> bool:
    # Sizes 0 and 1 would be compiled apart from all others, and are not worth it.
    return tensor.device.type in COMPILED_DEVICES and min(tensor.shape[-2:], default=0) > 1


def define_operation(
    name: str,
    schema: str,
    *,
    forward: Body,
    forward_shapes: Body,
    backward: Body,
    backward_shapes: Body,
    backward_schema: str,
    keep: Callable[[Any, Any, Any], None],
) -> Body:
    """Register an operation and its backward.

    Args:
        name: it becomes `onellm::name`, with `onellm::name_backward`.
        schema: arguments and results.
        forward: computes it.
        forward_shapes: gives empty results.
        backward: computes the gradients from those of the results and what was kept.
        backward_shapes: gives empty gradients.
        backward_schema: arguments and results of the backward.
        keep: (ctx, inputs, output): keeps what `backward` takes, by `save_for_backward`.

    Returns:
        A function that calls it, with gradients.
    """
    for own, own_schema, body, shapes in (
        (name, schema, forward, forward_shapes),
        (f"{name}_backward", backward_schema, backward, backward_shapes),
    ):
        qualified = f"{NAMESPACE}::{own}"
        torch.library.define(qualified, own_schema)
        torch.library.impl(qualified, ("cpu", "cuda"), body)
        torch.library.register_fake(qualified, shapes)
    refuse_gradients(f"{name}_backward")
    run_backward = Call(f"{name}_backward", backward)
    results = len(getattr(OPERATIONS, name).default._schema.returns)
    arguments = len(getattr(OPERATIONS, name).default._schema.arguments)

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        if all(gradient is None for gradient in gradients):  # what comes after has none
            return (None,) * arguments
        found = run_backward(*gradients[:results], *ctx.saved_tensors)
        found = found if isinstance(found, tuple) else (found,)
        return found + (None,) * (arguments - len(found))

    return give_gradients(Call(name, forward), differentiate, keep)


def refuse_gradients(name: str) -> None:
    """Let a backward's own gradient, a second derivative, raise NotImplementedError.

    torch would differentiate its body, in which what forward kept counts as constant.

    Args:
        name: of the backward, `onellm::name`.
    """

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{name}: fused kernels have no second derivative; use plain kernels"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse)


def _refuse_tangents(name: str, inputs: tuple[Any, ...]) -> None:
    tensors = (each for each in inputs if isinstance(each, torch.Tensor))
    if any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
        raise NotImplementedError(
            f"{NAMESPACE}::{name}: fused kernels have no forward-mode derivative; use plain kernels"
        )


class Call:
    """Calls a registered operation by the shortest way that shows it to all who watch.

    Those are modes of dispatch (selective recomputation, the planner) and kinds of tensors that
    have no values. Where there are none, its body runs without the detour through torch's registry.

    Args:
        name: of `onellm::name`.
        body: computes it.
    """

    def __init__(self, name: str, body: Body) -> None:
        self.name = name
        self.operation = getattr(OPERATIONS, name).default
        self._body = body

    def __call__(self, *inputs: Any) -> Any:
        """Call it without gradients; where they are on, as torch does.

        Raises:
            NotImplementedError: an input has a tangent, which would be lost below autograd.
        """
        if forward_ad._current_level >= 0:  # no call: this runs for every norm of a forward pass
            _refuse_tangents(self.name, inputs)
        if torch.is_grad_enabled():  # a gradient's own gradient
            return self.operation(*inputs)
        first = inputs[0]
        watched = torch._C._len_torch_dispatch_stack() or type(first) not in _PLAIN or first.is_meta
        with torch._C._AutoDispatchBelowAutograd():
            return (self.operation if watched else self._body)(*inputs)


def give_gradients(
    call: Call, differentiate: Callable[..., Any], keep: Callable[[Any, Any, Any], None]
) -> Body:
    """Register the gradients of an operation. Returns a function that calls it, with gradients.

    torch's own way to the gradients of a registered operation costs the host twice what an autograd
    function does; torch.compile wants torch's own.

    Args:
        call: calls the operation without gradients.
        differentiate: (ctx, gradients of the results): the gradients of the arguments.
        keep: (ctx, inputs, output): keeps what `differentiate` needs.
    """
    qualified = f"{NAMESPACE}::{call.name}"
    torch.library.register_autograd(qualified, differentiate, setup_context=keep)

    class Fused(torch.autograd.Function):
        backward = staticmethod(differentiate)

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = call(*inputs)
            keep(ctx, inputs, output)
            return output

    apply: Body = Fused.apply

    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return call.operation(*inputs)
        return apply(*inputs) if torch.is_grad_enabled() else call(*inputs)

    return run
