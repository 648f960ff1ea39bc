"""Rows of token ids, padded to one length, as transformers' processors give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature

from onellm_dist.common.errors import UsageError
from onellm_dist.common.token_limit import find_tokens_without_embedding

_OPTIONS = ("padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of")


@dataclass(frozen=True)
class Padding:
    """How rows are given back.

    Attributes:
        return_tensors: `pt`, `np`, or None for lists.
        padding: True or `longest`, `max_length`, or False.
        padding_side: `left` or `right`.
        truncation: whether rows are cut at their ends.
        max_length: tokens of a row.
        pad_to_multiple_of: rows are filled up to a multiple of it.
    """

    return_tensors: str | None = "pt"
    padding: bool | str = True
    padding_side: str = "left"
    truncation: bool | str | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("return_tensors", self.return_tensors, ("pt", "np", None)),
            ("padding", self.padding, (True, False, "longest", "max_length", "do_not_pad")),
            ("padding_side", self.padding_side, ("left", "right")),
            ("truncation", self.truncation, (True, False, None, "longest_first")),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise UsageError(
                    f"{name}={value!r}",
                    "the processor has no such form.",
                    f"use one of: {', '.join(map(repr, allowed))}.",
                )
        if self.max_length is None and (self.padding == "max_length" or self.truncation):
            raise UsageError(
                "padding='max_length' or truncation without max_length",
                "the length is not known.",
                "give max_length.",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any], return_tensors: str | None) -> Padding:
        """Take the options of a call.

        Args:
            options: by name.
            return_tensors: as of the attribute.

        Raises:
            UsageError: an option is unknown.
        """
        given = {"return_tensors": return_tensors, **options}
        given.pop("add_special_tokens", None)  # the template's text has them
        if unknown := sorted(given.keys() - {*_OPTIONS, "return_tensors"}):
            raise UsageError(
                f"unknown option {', '.join(unknown)}",
                "it would have no effect.",
                f"the processor takes {', '.join(_OPTIONS)} and return_tensors.",
            )
        return cls(**given)


def make_features(
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    values: Mapping[str, torch.Tensor],
    shape: Padding,
    masks: Sequence[Sequence[int]] | None = None,
) -> BatchFeature:
    """Inputs of the model.

    Args:
        tokenizer: a transformers tokenizer.
        rows: ids of each prompt.
        values: `image_values` and so on -> [B, *value_shape].
        shape: how the rows are padded.
        masks: `assistant_masks`, as long as the rows.

    Raises:
        UsageError: rows of several lengths would have to be one tensor.
    """
    if shape.truncation:
        rows = [row[: shape.max_length] for row in rows]
        masks = None if masks is None else [mask[: shape.max_length] for mask in masks]
    length = max(map(len, rows), default=0)
    if shape.padding == "max_length":
        length = max(length, shape.max_length or 0)
    if shape.pad_to_multiple_of:
        length = -(-length // shape.pad_to_multiple_of) * shape.pad_to_multiple_of
    pads = shape.padding not in (False, "do_not_pad")
    if not pads and shape.return_tensors and any(len(row) != length for row in rows):
        raise UsageError(
            "padding=False for prompts of several lengths",
            "they do not make one tensor.",
            "use padding=True, or return_tensors=None.",
        )

    def fill(row: Sequence[int], pad: int) -> list[int]:
        gap = [pad] * (length - len(row)) if pads else []
        return [*gap, *row] if shape.padding_side == "left" else [*row, *gap]

    data: dict[str, Any] = {
        "input_ids": [fill(row, _choose_pad(tokenizer)) for row in rows],
        "attention_mask": [fill([1] * len(row), 0) for row in rows],
    }
    if masks is not None:
        data["assistant_masks"] = [fill(mask, 0) for mask in masks]
    data |= values if shape.return_tensors != "np" else {k: v.numpy() for k, v in values.items()}
    return BatchFeature(data, tensor_type=shape.return_tensors)


def _choose_pad(tokenizer: Any) -> int:
    """The padding token, or one that the LLM has an embedding of."""
    beyond = find_tokens_without_embedding(tokenizer)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None and i not in beyond)
