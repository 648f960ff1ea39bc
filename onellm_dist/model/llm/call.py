"""Running the LLM exactly, in the way that `check.py` has shown to be exact for its family.

`varlen`: one forward over the packed sequence, with packed attention. `rows`: the samples of a pack
become the rows of one batch, padded on the right and run without a mask. Nothing causal sees what
stands behind it, so layers with a state (recurrent, convolutional) and attention of the LLM's own
give each row what its sample gives alone. Either way the LLM runs once per forward, so that the
collectives of a sharded model match on all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model.llm.attention import ATTENTION_NAME, build_packed_mask
from onellm_dist.model.llm.per_layer import give_token_ids
from onellm_dist.model.llm.rope import set_lengths
from onellm_dist.model.sequence_lengths import SequenceLengths, to_device_tensor

Packing = Literal["varlen", "rows"]


@dataclass(frozen=True)
class LLMSupport:
    """How an LLM runs exactly.

    Attributes:
        attention: `attn_implementation` of transformers that it is built with.
        packing: how a pack runs: `varlen` or `rows`.
        padding: whether padded batches are exact with a mask; if not, their rows are moved to the
            left and run without one, and texts are generated one at a time.
        generation: whether it can continue embeddings (media) at all.
        spare_positions: how many more rows its table of positions has than its config names; None:
            it has no such table.
        position_limit: rows of its table of positions, beyond which it fails; None: it has none.
        cached: whether texts that are continued can be the rows of one batch (`cached.py`).
    """

    attention: str = ATTENTION_NAME
    packing: Packing = "varlen"
    padding: bool = True
    generation: bool = True
    spare_positions: int | None = None
    position_limit: int | None = None
    cached: bool = True


def run_packed(
    llm: Any,
    support: LLMSupport,
    sequence: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    lengths: Sequence[int],
    position_ids: torch.Tensor,
    places: torch.Tensor,
    cache: Any = None,
) -> torch.Tensor:
    """Logits of some positions of a pack: [N, V].

    Args:
        llm: the causal LM.
        support: how it runs exactly.
        sequence: [T, d] embeddings of all samples, end to end.
        token_ids: [T], id of each token; MEDIA inside a span (see `per_layer.py`).
        lengths: positions of each sample.
        position_ids: [T], 0, 1, ... within each sample.
        places: [N] int64 positions whose logits are wanted.
        cache: transformers' cache to be filled with keys and values, if the packing is `varlen`.

    Raises:
        OneLLMError: the LLM was changed after it was opened.
        UsageError: a sample is longer than the LLM's learned positions.
    """
    check_call(llm, support, max(lengths, default=0))
    if support.packing == "rows":
        set_lengths(llm, None)
        return _run_rows(llm, sequence, token_ids, lengths, places)
    set_lengths(llm, lengths)
    seq_lengths = SequenceLengths.from_lengths(lengths, device=sequence.device)
    options: dict[str, Any] = {get_cache_keyword(llm.__class__): cache}
    keeps = takes_logits_to_keep(llm.__class__)
    if keeps:
        options["logits_to_keep"] = places
    with _keep_positions(llm, None if keeps else places), give_token_ids(llm, token_ids[None]):
        output = llm(
            inputs_embeds=sequence[None],
            position_ids=position_ids[None],
            attention_mask=build_packed_mask(seq_lengths),
            use_cache=cache is not None,
            seq_lengths=seq_lengths,
            **options,
        )
    logits: torch.Tensor = output.logits[0]
    return logits


def _run_rows(
    llm: Any,
    sequence: torch.Tensor,
    token_ids: torch.Tensor,
    lengths: Sequence[int],
    places: torch.Tensor,
) -> torch.Tensor:
    """A pack as the rows of one batch; rows are filled up with their last token."""
    count = torch.tensor(lengths)
    longest = int(count.max())
    starts = count.cumsum(0) - count
    column = torch.arange(longest)
    rows = starts[:, None] + torch.minimum(column, count[:, None] - 1)
    # The place in [n * longest] of each position of the pack.
    flat = torch.arange(len(lengths))[:, None] * longest + column
    at = to_device_tensor(flat[column < count[:, None]], sequence.device)
    source = to_device_tensor(rows.flatten(), sequence.device)
    embeds, ids = sequence.index_select(0, source), token_ids.index_select(0, source)
    kept = _keep_positions(llm, at.index_select(0, places))
    with kept, give_token_ids(llm, ids.reshape(len(lengths), longest)):
        output = llm(
            inputs_embeds=embeds.reshape(len(lengths), longest, sequence.shape[-1]), use_cache=False
        )
    logits: torch.Tensor = output.logits[0]
    return logits


def run_padded(
    llm: Any,
    support: LLMSupport,
    embeds: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Logits of a padded batch: [B, S, V]; those of padding mean nothing.

    Args:
        llm: the causal LM.
        support: how it runs exactly.
        embeds: [B, S, d] embeddings.
        token_ids: [B, S], id of each token; MEDIA inside a span.
        mask: [B, S], 1 for real positions.
        position_ids: [B, S]; real positions count 0, 1, ...

    Raises:
        OneLLMError: the LLM was changed after it was opened.
        UsageError: a text is longer than the LLM's learned positions.
    """
    check_call(llm, support, embeds.shape[1])
    set_lengths(llm, None)
    if support.padding:
        with give_token_ids(llm, token_ids):
            output = llm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=False,
            )
        return output.logits  # type: ignore[no-any-return]  # transformers' output
    # Real positions first, in their order; what stands behind them, nothing causal sees.
    order = (mask == 0).to(torch.int8).sort(dim=1, stable=True).indices
    moved = embeds.gather(1, order[..., None].expand_as(embeds))
    with give_token_ids(llm, token_ids.gather(1, order)):
        logits: torch.Tensor = llm(inputs_embeds=moved, use_cache=False).logits
    back = order.argsort(dim=1)
    return logits.gather(1, back[..., None].expand(*back.shape, logits.shape[-1]))


def split_prompts(
    support: LLMSupport, embeds: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The batches in which prompts are continued: all at once, or one at a time without padding.

    Args:
        support: how the LLM runs exactly.
        embeds: [B, S, d] embeddings of the prompts.
        token_ids: [B, S], id of each token; MEDIA inside a span.
        mask: [B, S], 1 for real positions.

    Returns:
        (embeddings, ids, mask) of each batch, in the order of the prompts.
    """
    if support.padding or bool(mask.all()):
        return [(embeds, token_ids, mask)]
    kept = [row.nonzero().squeeze(1) for row in mask]
    return [
        (row[None].index_select(1, at), ids[None].index_select(1, at), mask.new_ones((1, len(at))))
        for row, ids, at in zip(embeds, token_ids, kept, strict=True)
    ]


@cache
def takes_logits_to_keep(llm_class: type) -> bool:
    """Whether the forward of an LLM class computes the logits of chosen positions alone."""
    forward: Any = llm_class.forward  # type: ignore[attr-defined]  # of a torch module
    return "logits_to_keep" in inspect.signature(forward).parameters


@cache
def get_cache_keyword(llm_class: type) -> str:
    """The keyword under which the forward of an LLM class takes its keys and values.

    transformers 5.24 calls `past_key_values` `cache`, and takes the old name until 5.40. Code of
    others has a name of its own time.
    """
    forward: Any = llm_class.forward  # type: ignore[attr-defined]  # of a torch module
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


@contextmanager
def _keep_positions(llm: Any, places: torch.Tensor | None) -> Iterator[None]:
    """Give the head nothing but the hidden states of `places`, as one row; None: change nothing."""
    if places is None:
        yield
        return

    def select(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = args
        return (hidden.flatten(0, 1).index_select(0, places)[None], *others)

    handle = llm.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def check_call(llm: Any, support: LLMSupport, longest: int) -> None:
    """Check that an LLM is still the one that was opened, and has enough positions.

    Args:
        llm: the causal LM.
        support: how it runs exactly.
        longest: positions of the longest sequence.

    Raises:
        OneLLMError: its attention was changed.
        UsageError: `longest` exceeds its learned positions.
    """
    current = llm.config._attn_implementation
    if current != support.attention:
        raise OneLLMError(
            f"the LLM's attn_implementation was changed to {current!r}",
            f"{type(llm).__name__} has been shown exact with {support.attention!r} alone; with "
            "another one, samples of a pack could see each other.",
            "leave it as it is; packs already take the fastest kernel of the machine.",
        )
    if support.position_limit is not None and longest > support.position_limit:
        raise UsageError(
            f"a sequence of {longest} positions (text and media)",
            f"{type(llm).__name__} has a table of {support.position_limit} positions.",
            "shorten the texts (data.max_text_tokens), or use an LLM with more positions.",
        )
