"""Cross-entropy in chunks of rows, for large vocabularies.

The plain form holds fp32 copies of all logits: 150,000 words times 8,000 tokens are 5 GB each. Here
the logits themselves and one number for each row are kept, and one chunk at a time is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from onellm_dist.model.kernels.pointwise import define_operation

CHUNK_ELEMENTS = 2**24
"""Logits of a chunk: 64 MiB in fp32."""
IGNORED = -100
"""Target of a row without a loss, as of `F.cross_entropy`."""


def compute_chunked_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in fp32: logits [N, V], targets [N] -> [N].

    A target is 0 to V - 1, or IGNORED.

    Raises:
        RuntimeError: a target is anything else. On a GPU it is torch's assertion in the kernel that
            reads the logit, which ends the process at its next synchronisation.
    """
    nll: torch.Tensor = _run_cross_entropy(logits, targets)[0]
    return nll


def _split(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _forward(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([N] losses, [N] log of each row's sum), fp32."""
    nll, lse = _forward_shapes(logits, targets)
    ignored = targets == IGNORED
    known = targets.masked_fill(ignored, 0)[:, None]
    for rows in _split(logits):
        wide = logits[rows].float()
        torch.logsumexp(wide, 1, out=lse[rows])
        nll[rows] = lse[rows] - wide.gather(1, known[rows])[:, 0]
    return nll.masked_fill_(ignored, 0.0), lse


def _forward_shapes(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(logits),)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(
        shape, dtype=torch.float32
    )


def _backward(
    gradient: torch.Tensor, _: Any, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """[N, V], in the dtype of the logits."""
    found = torch.empty_like(logits)
    ignored = targets == IGNORED
    gradient = gradient.masked_fill(ignored, 0.0)[:, None]
    known = targets.masked_fill(ignored, 0)[:, None]
    for rows in _split(logits):
        shares = logits[rows].float().sub_(lse[rows, None]).exp_()
        shares.scatter_add_(1, known[rows], shares.new_full((len(shares), 1), -1.0))
        found[rows] = shares.mul_(gradient[rows])
    return found


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


_run_cross_entropy = define_operation(
    "chunked_cross_entropy",
    "(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    forward=_forward,
    forward_shapes=_forward_shapes,
    backward=_backward,
    backward_shapes=lambda gradient, _, logits, targets, lse: torch.empty_like(logits),
    backward_schema="(Tensor gradient, Tensor? none, Tensor logits, Tensor targets, Tensor lse)"
    " -> Tensor",
    keep=_keep,
)
