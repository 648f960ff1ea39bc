"""Where everything stands in the LLM's packed sequence: a pure function of text lengths and modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import QUERY_TOKENS, SPAN_TOKENS


@dataclass(frozen=True)
class Layout:
    """The LLM sequence of a pack, as indices into one table of rows.

    The table is: the T_text text embeddings; then the modality tokens (30 a sample), modality by modality in the model's
    order, samples in pack order; then start tag and end tag of every modality. A sample's sequence is its BOS, its spans
    (start tag, 30 tokens, end tag), the rest of its text.

    Attributes:
        lengths: [n] LLM positions of each sample.
        counts: samples (rows of values) of each modality.
        gather: [T] table row of each LLM position.
        position_ids: [T] 0, 1, ... within each sample.
        predictor: [T_text] LLM position whose logits predict this text token (its own for a BOS, which is never a target).
    """

    lengths: tuple[int, ...]
    counts: dict[str, int]
    gather: np.ndarray
    position_ids: np.ndarray
    predictor: np.ndarray

    @classmethod
    def of(
        cls,
        text_token_counts: Sequence[int],
        modalities: Sequence[Sequence[str]],
        known: Sequence[str],
    ) -> Layout:
        """The layout of a pack.

        Args:
            text_token_counts: text tokens of each sample, BOS included, each at least 1.
            modalities: the spans of each sample, in their order.
            known: every modality of the model, in its order.

        Raises:
            OneLLMError: an empty text, an unknown modality, or lists of different lengths.
        """
        _check(text_token_counts, modalities, known)
        counts = {name: sum(list(spans).count(name) for spans in modalities) for name in known}
        text = sum(text_token_counts)
        starts = text + QUERY_TOKENS * np.cumsum(
            [0, *counts.values()]
        )  # first token row of each modality, then the tags
        next_row = dict(zip(known, starts[:-1].tolist(), strict=True))
        tag_row = {name: int(starts[-1]) + 2 * i for i, name in enumerate(known)}

        gather, position_ids, predictor, lengths = [], [], [], []
        text_start = llm_start = 0
        for length, spans in zip(text_token_counts, modalities, strict=True):
            pieces = [np.array([text_start])]
            for name in spans:
                tokens = np.arange(next_row[name], next_row[name] + QUERY_TOKENS)
                pieces += [np.array([tag_row[name]]), tokens, np.array([tag_row[name] + 1])]
                next_row[name] += QUERY_TOKENS
            pieces.append(np.arange(text_start + 1, text_start + length))
            total = length + SPAN_TOKENS * len(spans)
            gather += pieces
            position_ids.append(np.arange(total))
            own = np.concatenate(
                [[llm_start + 1], np.arange(llm_start + total - length + 1, llm_start + total)]
            )
            predictor.append(own - 1)
            lengths.append(total)
            text_start += length
            llm_start += total
        return cls(
            tuple(lengths),
            counts,
            *(
                np.concatenate([np.empty(0, np.int64), *x])
                for x in (gather, position_ids, predictor)
            ),
        )


def _check(
    text_token_counts: Sequence[int], modalities: Sequence[Sequence[str]], known: Sequence[str]
) -> None:
    do = "mend whoever made this pack (see onellm_dist/packed.py)."
    if len(text_token_counts) != len(modalities):
        raise OneLLMError(
            f"{len(text_token_counts)} text lengths but modalities of {len(modalities)} samples",
            "they must be one a sample.",
            do,
        )
    short = [i for i, length in enumerate(text_token_counts) if length < 1]
    if short:
        raise OneLLMError(
            f"samples {short} of the pack have no text token", "a sequence starts with BOS.", do
        )
    unknown = sorted({name for spans in modalities for name in spans} - set(known))
    if unknown:
        raise OneLLMError(
            f"the pack has {', '.join(unknown)}, which this model does not read",
            f"it reads {', '.join(known)}.",
            do,
        )
