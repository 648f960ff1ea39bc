"""Where everything stands in the LLM's packed sequence: token counts, modalities and places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import QUERY_TOKENS, SPAN_TOKENS
from onellm_dist.packed import PackedBatch

_DO = "fix the code that made this pack (see onellm_dist/packed.py)."


@dataclass(frozen=True)
class PackedLayout:
    """The LLM sequence of a pack, as indices into one table of rows.

    The table holds the T_text text embeddings; then the modality tokens, 30 a span, modality by
    modality in the model's order and samples in the order of the pack; then start tag and end tag
    of every modality. The sequence of a sample is its text with media spans (start tag, 30 tokens,
    end tag) at their places, by default behind BOS.

    Attributes:
        lengths: LLM positions of each of the n samples.
        counts: spans of each modality, which is also its number of rows of values.
        gather: [T], row of the table at each LLM position.
        position_ids: [T], 0, 1, ... within each sample.
        predictor: [T_text], LLM position whose logits predict each text token; for a BOS, which is
            never a target, its own position.
    """

    lengths: tuple[int, ...]
    counts: dict[str, int]
    gather: np.ndarray
    position_ids: np.ndarray
    predictor: np.ndarray

    @classmethod
    def build(
        cls,
        text_token_counts: Sequence[int],
        modalities: Sequence[Sequence[str]],
        known: Sequence[str],
        places: Sequence[Sequence[int]] = (),
        again: Sequence[bool] = (),
    ) -> PackedLayout:
        """Lay out a pack.

        Args:
            text_token_counts: text tokens of each sample, BOS included, each at least 1.
            modalities: modality of each span of each sample, in order.
            known: every modality of the model, in its order.
            places: text tokens before each span of each sample; () if all stand behind BOS.
            again: whether a sample is read with the media of the one before it, and has no rows of
                its own; () if none is.

        Raises:
            OneLLMError: an empty text, an unknown modality, a place outside the text, or lists of
                different lengths.
        """
        _check_arguments(text_token_counts, modalities, known)
        if places:
            _check_places(text_token_counts, modalities, places)
        counts = _count_spans(modalities, known, again)
        # The first token row of each modality, and behind the last one the first tag row.
        starts = sum(text_token_counts) + QUERY_TOKENS * np.cumsum([0, *counts.values()])
        next_row = dict(zip(known, starts[:-1].tolist(), strict=True))
        tag_row = {name: int(starts[-1]) + 2 * i for i, name in enumerate(known)}
        empty = np.empty(0, np.int64)
        gather, position_ids, predictor, lengths = [empty], [empty], [empty], []
        text_start = llm_start = 0
        for i, (length, spans) in enumerate(zip(text_token_counts, modalities, strict=True)):
            own_places = places[i] if places else (1,) * len(spans)
            if not (again and again[i]):
                before = dict(next_row)
            next_row = dict(before)
            done = 0
            for name, place in zip(spans, own_places, strict=True):
                if place > done:
                    gather.append(np.arange(text_start + done, text_start + place))
                    done = place
                tokens = np.arange(next_row[name], next_row[name] + QUERY_TOKENS)
                gather += [np.array([tag_row[name]]), tokens, np.array([tag_row[name] + 1])]
                next_row[name] += QUERY_TOKENS
            gather.append(np.arange(text_start + done, text_start + length))
            total = length + SPAN_TOKENS * len(spans)
            position_ids.append(np.arange(total))
            if places:
                predictor.append(_find_predictors(length, own_places, llm_start))
            else:
                text_rest = np.arange(llm_start + total - length + 1, llm_start + total)
                predictor.append(np.concatenate([[llm_start + 1], text_rest]) - 1)
            lengths.append(total)
            text_start += length
            llm_start += total
        rows, positions, predictors = map(np.concatenate, (gather, position_ids, predictor))
        return cls(tuple(lengths), counts, rows, positions, predictors)

    @classmethod
    def of(cls, batch: PackedBatch, known: Sequence[str]) -> PackedLayout:
        """Lay out a micro-batch, of pairs as two sequences a sample; see `build`.

        Args:
            batch: the micro-batch.
            known: every modality of the model, in its order.
        """
        if not batch.chosen_tokens:
            return cls.build(batch.text_token_counts, batch.modalities, known, batch.places)
        counts: list[int] = []
        owner: list[int] = []
        for i, (tokens, chosen) in enumerate(
            zip(batch.text_token_counts, batch.chosen_tokens, strict=True)
        ):
            own = [chosen, tokens - chosen] if chosen else [tokens]
            counts += own
            owner += [i] * len(own)
        return cls.build(
            counts,
            [batch.modalities[i] for i in owner],
            known,
            [batch.places[i] for i in owner] if batch.places else (),
            [i > 0 and owner[i] == owner[i - 1] for i in range(len(owner))],
        )

    def check(self, batch: PackedBatch) -> None:
        """Check that a pack's values and tokens are as many as this layout has places for.

        Raises:
            OneLLMError: the pack contradicts itself.
        """
        wrong = [
            f"{name}: {format_count(len(value), 'row')} for "
            f"{format_count(self.counts.get(name, 0), 'span')}"
            for name, value in batch.values.items()
            if len(value) != self.counts.get(name, 0)
        ]
        wrong += [
            f"{name}: no values for {format_count(count, 'span')}"
            for name, count in self.counts.items()
            if count and name not in batch.values
        ]
        if len(batch.input_ids) != len(self.predictor):
            wrong.append(
                f"{len(batch.input_ids)} text tokens for token counts that sum to "
                f"{len(self.predictor)}"
            )
        if wrong:
            raise OneLLMError(
                f"the pack contradicts itself: {'; '.join(wrong)}",
                "samples would be mixed up.",
                _DO,
            )


def _count_spans(
    modalities: Sequence[Sequence[str]], known: Sequence[str], again: Sequence[bool]
) -> dict[str, int]:
    """Spans of each modality that have rows of their own."""
    own = [spans for i, spans in enumerate(modalities) if not (again and again[i])]
    return {name: sum(list(spans).count(name) for spans in own) for name in known}


def _find_predictors(length: int, places: Sequence[int], start: int) -> np.ndarray:
    """[length] LLM position before each text token of a sample; for its BOS, its own position."""
    before = np.bincount(np.asarray(places, np.int64), minlength=length + 1).cumsum()[:length]
    positions: np.ndarray = start + np.arange(length) + SPAN_TOKENS * before - 1
    positions[0] = start
    return positions


def _check_places(
    text_token_counts: Sequence[int],
    modalities: Sequence[Sequence[str]],
    places: Sequence[Sequence[int]],
) -> None:
    wrong = len(places) != len(modalities) or any(
        len(own) != len(spans)
        or any(not 1 <= place <= length for place in own)
        or list(own) != sorted(own)
        for length, spans, own in zip(text_token_counts, modalities, places, strict=False)
    )
    if wrong:
        raise OneLLMError(
            f"the pack places the spans {list(map(tuple, modalities))!r:.200} at "
            f"{list(map(tuple, places))!r:.200} of texts of {list(text_token_counts)!r:.90} tokens",
            "each span stands behind one of the tokens of its sample, in ascending order.",
            _DO,
        )


def _check_arguments(
    text_token_counts: Sequence[int], modalities: Sequence[Sequence[str]], known: Sequence[str]
) -> None:
    if len(text_token_counts) != len(modalities):
        raise OneLLMError(
            f"{format_count(len(text_token_counts), 'token count')} but modalities of "
            f"{format_count(len(modalities), 'sample')}",
            "every sample needs one of each.",
            _DO,
        )
    short = [i for i, length in enumerate(text_token_counts) if length < 1]
    if short:
        raise OneLLMError(
            f"samples {short} of the pack have no text token", "a sequence starts with BOS.", _DO
        )
    unknown = sorted({name for spans in modalities for name in spans} - set(known))
    if unknown:
        raise OneLLMError(
            f"the pack has {', '.join(unknown)}, which this model does not read",
            f"it reads {', '.join(known)}.",
            _DO,
        )
