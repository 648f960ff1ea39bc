"""The next tokens of the rows of a batch: greedy, or drawn with a number of each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.sequence_lengths import to_device_tensor

_LEAST_TEMPERATURE = 1e-30
"""Below it logits would become infinite in fp32, and their softmax NaN; it is greedy already."""
NO_TOKEN = -1
"""In place of a token that cannot be chosen: the logits are not numbers."""


class RowSampling(NamedTuple):
    """How the next token of one row is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Probability mass of the nucleus."""
    draw: float = 0.0
    """A random number of [0, 1), which decides."""


Choose = Callable[[torch.Tensor, Sequence[RowSampling]], list[int]]
"""Called as `choose_tokens` is."""


def make_logits_error() -> OneLLMError:
    """The error of an answer that no token can be chosen for."""
    return OneLLMError(
        "the LLM gave logits that are not numbers",
        "no token can be chosen by them.",
        "its weights are damaged, or do not fit the 16-bit type; try fp32.",
    )


def choose_tokens(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    """The next token of each row, whatever the other rows are.

    Args:
        logits: [B, V].
        rows: how each is chosen.

    Returns:
        Ids; `NO_TOKEN` for a row whose logits are not numbers.
    """
    logits = logits.float()
    best, tokens = logits.max(-1)
    tokens = torch.where(best.isfinite(), tokens, NO_TOKEN)
    for narrow in (False, True):
        places = [
            place
            for place, row in enumerate(rows)
            if row.temperature > 0 and (row.top_p < 1) == narrow
        ]
        if not places:
            continue
        at = to_device_tensor(places, logits.device)
        drawn = _draw(logits.index_select(0, at), [rows[place] for place in places], narrow=narrow)
        tokens = tokens.index_copy(0, at, drawn)
    found: list[int] = tokens.tolist()
    return found


def _draw(logits: torch.Tensor, rows: Sequence[RowSampling], *, narrow: bool) -> torch.Tensor:
    """Draw from each row's nucleus, or from all tokens: [N, V] -> [N] ids or `NO_TOKEN`."""
    device = logits.device
    heat = torch.tensor([[max(row.temperature, _LEAST_TEMPERATURE)] for row in rows])
    shares = torch.softmax(logits / heat.to(device), -1)
    ids = None
    if narrow:
        shares, ids = shares.sort(descending=True, stable=True)
        mass = torch.tensor([[row.top_p] for row in rows]).to(device)
        shares = torch.where(shares.cumsum(-1) - shares <= mass, shares, 0.0)
    sums = shares.double().cumsum(-1)
    total = sums[:, -1:]
    draws = torch.tensor([[row.draw] for row in rows], dtype=torch.float64).to(device)
    place = torch.searchsorted(sums, draws * total, right=True)
    # Rounding may make the product the total: then it is the last token with a probability.
    place = torch.minimum(place, (sums < total).sum(-1, keepdim=True))
    possible = total.isfinite() & (total > 0)
    chosen = place if ids is None else ids.gather(1, place)
    return torch.where(possible, chosen, NO_TOKEN).squeeze(1)
