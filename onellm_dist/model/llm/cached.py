"""Continuing several texts at once: a packed prefill without padding, then one token a row.

The prefill runs all prompts as one pack, with packed attention, and keeps the keys and values of
every layer. They are then laid out as the rows of a batch, aligned on the right, and each step adds
one token to every row. Whether this is exact for an LLM is tried when it is opened
(`probe_cached.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.llm.call import LLMSupport, get_cache_keyword, run_packed
from onellm_dist.model.llm.rope import set_lengths
from onellm_dist.model.sequence_lengths import to_device_tensor

_SPARE_COLUMNS = 64
"""New tokens for which there is room before keys and values are copied."""


@dataclass
class CachedRows:
    """Texts that are being continued, as the rows of a batch.

    Attributes:
        cache: keys and values of each layer, [B, H, L, D/H], aligned on the right.
        lengths: positions of each row that are real; the L - length before them are padding.
    """

    cache: DynamicCache
    lengths: list[int]

    @property
    def columns(self) -> int:
        """L: positions of each row, padding included."""
        return int(self.cache.get_seq_length())

    def join(self, others: CachedRows) -> CachedRows:
        """Append other rows behind these; the shorter ones are padded.

        Args:
            others: rows of the same LLM.
        """
        columns = max(self.columns, others.columns)
        cache = DynamicCache()
        cache.layers = [
            _GrowingLayer.join((own_k, k), (own_v, v), columns)
            for (own_k, own_v), (k, v) in zip(
                _get_layers(self.cache), _get_layers(others.cache), strict=True
            )
        ]
        return CachedRows(cache, [*self.lengths, *others.lengths])

    def keep(self, rows: Sequence[int]) -> CachedRows:
        """Some of the rows, without the columns that are padding in all of them.

        Args:
            rows: which of the rows, in order.
        """
        lengths = [self.lengths[row] for row in rows]
        layers = _get_layers(self.cache)
        at = to_device_tensor(list(rows), layers[0][0].device)
        first = self.columns - max(lengths)
        kept = [
            (k.index_select(0, at)[:, :, first:], v.index_select(0, at)[:, :, first:])
            for k, v in layers
        ]
        return CachedRows(_build_cache(kept), lengths)


def prefill(
    llm: Any,
    support: LLMSupport,
    sequence: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    lengths: Sequence[int],
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, CachedRows]:
    """Run prompts as one pack.

    Args:
        llm: the causal LM.
        support: how it runs exactly; it must be `cached`.
        sequence: [T, d] embeddings of all prompts, end to end.
        token_ids: [T], id of each token; MEDIA inside a span.
        lengths: positions of each prompt.
        position_ids: [T], 0, 1, ... within each prompt.

    Returns:
        ([B, V] logits of each prompt's next token, the rows to continue).

    Raises:
        OneLLMError: the LLM was changed after it was opened, or keeps something else than keys and
            values of every position.
        UsageError: a prompt is longer than the LLM's learned positions.
    """
    cache = DynamicCache()
    ends = torch.tensor(lengths).cumsum(0) - 1
    logits = run_packed(
        llm,
        support,
        sequence,
        token_ids=token_ids,
        lengths=lengths,
        position_ids=position_ids,
        places=to_device_tensor(ends, sequence.device),
        cache=cache,
    )
    return logits, CachedRows(_split_rows(cache, lengths), list(lengths))


def decode(llm: Any, rows: CachedRows, tokens: torch.Tensor) -> torch.Tensor:
    """Add one token to every row: [B] ids -> [B, V] logits of the next ones.

    Args:
        llm: the causal LM.
        rows: the texts so far; they grow by one position.
        tokens: [B] ids.
    """
    set_lengths(llm, None)
    device, columns = tokens.device, rows.columns + 1
    count = to_device_tensor(rows.lengths, device)
    column = torch.arange(columns, device=device)
    mask = (column >= columns - 1 - count[:, None]).to(torch.int64)
    output = llm(
        input_ids=tokens[:, None],
        attention_mask=mask,
        position_ids=count[:, None],
        use_cache=True,
        **{get_cache_keyword(llm.__class__): rows.cache},
    )
    rows.lengths = [length + 1 for length in rows.lengths]
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _split_rows(cache: DynamicCache, lengths: Sequence[int]) -> DynamicCache:
    """[1, H, T, D/H] keys and values of a pack -> [B, H, L, D/H], a row for each text."""
    longest, total = max(lengths), sum(lengths)
    layers = _get_layers(cache)
    if not layers or any(len(x) != 1 or x.shape[2] != total for layer in layers for x in layer):
        raise OneLLMError(
            "the LLM does not keep keys and values of every position",
            "texts could not be continued exactly as a batch.",
            "this is a fault of onellm_dist: report the LLM.",
        )
    count = torch.tensor(lengths)
    starts = count.cumsum(0) - count
    place = torch.arange(longest) - (longest - count)[:, None]
    at = to_device_tensor((starts[:, None] + place.clamp(min=0)).flatten(), layers[0][0].device)

    def lay_out(x: torch.Tensor) -> torch.Tensor:
        rows: Any = x[0].index_select(1, at).unflatten(1, (len(lengths), longest))
        laid: torch.Tensor = rows.transpose(0, 1).contiguous()
        return laid

    return _build_cache([(lay_out(k), lay_out(v)) for k, v in layers])


def _get_layers(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers: list[Any] = list(cache.layers)
    return [(layer.keys, layer.values) for layer in layers if layer.keys is not None]


def _build_cache(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [_GrowingLayer(keys, values) for keys, values in layers]
    return cache


class _GrowingLayer(DynamicLayer):
    """Keys and values with room for more: transformers' own are copied for each token.

    Args:
        keys: [B, H, L, D/H].
        values: as `keys`.
    """

    keys: Any
    values: Any

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers has no annotation
        self.lazy_initialization(keys, values)
        self.keys = keys
        self.values = values
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def join(
        cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], columns: int
    ) -> _GrowingLayer:
        """The rows of several layers, in order; there is room for more at once.

        Args:
            keys: [B, H, L, D/H] of each.
            values: as `keys`.
            columns: what the shorter ones are padded to, on the left.
        """
        room = _join_rows(keys, columns), _join_rows(values, columns)
        layer = cls(room[0][:, :, :columns], room[1][:, :, :columns])
        layer._room = room
        return layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add positions; returns all keys and values."""
        first, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < end:
            self._room = (_make_room(self.keys, end), _make_room(self.values, end))
        keys, values = self._room
        keys[:, :, first:end] = key_states
        values[:, :, first:end] = value_states
        self.keys = keys[:, :, :end]
        self.values = values[:, :, :end]
        return self.keys, self.values


def _make_room(x: torch.Tensor, columns: int) -> torch.Tensor:
    """A copy of [B, H, L, D/H] with so many columns and some to spare; new ones mean nothing."""
    room = x.new_empty((*x.shape[:2], columns + _SPARE_COLUMNS, x.shape[3]))
    room[:, :, : x.shape[2]] = x
    return room


def _join_rows(parts: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """[B, H, L, D/H] each -> all rows: zeros before L, some columns to spare behind `columns`."""
    heads, width = parts[0].shape[1], parts[0].shape[3]
    count = sum(len(part) for part in parts)
    room = parts[0].new_empty((count, heads, columns + _SPARE_COLUMNS, width))
    first = 0
    for part in parts:
        end, missing = first + len(part), columns - part.shape[2]
        room[first:end, :, :missing] = 0
        room[first:end, :, missing:columns] = part
        first = end
    return room
