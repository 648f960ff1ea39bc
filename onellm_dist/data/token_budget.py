"""The token budgets of a recipe's micro-batches, where they are known."""

from __future__ import annotations

import numpy as np

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection
from onellm_dist.data.corpus import Corpus
from onellm_dist.data.micro_batch import SampleTable
from onellm_dist.data.packing import TokenBudget
from onellm_dist.modalities.base import SPAN_TOKENS

UNLIMITED = TokenBudget(1 << 40, 1 << 40)
"""Stands in for budgets that are found after the data was opened."""


def read_budget(data: DataSection) -> TokenBudget:
    """The token budgets of a `data` section.

    Raises:
        UsageError: they are `auto`, and nobody has found them.
    """
    llm, encoder = data.pack_llm_tokens, data.pack_encoder_tokens
    if isinstance(llm, str) or isinstance(encoder, str):
        raise UsageError(
            "data.pack_llm_tokens and data.pack_encoder_tokens are auto",
            "a start of training finds them for its devices; here nobody does.",
            "give numbers, such as those in the config.yaml of a run, or of "
            "`onellm plan --search`.",
        )
    return TokenBudget(llm, encoder)


def set_budget(data: DataSection, budget: TokenBudget) -> DataSection:
    """A `data` section with these budgets."""
    return data.model_copy(
        update={"pack_llm_tokens": budget.llm, "pack_encoder_tokens": budget.encoder}
    )


def find_smallest_budget(corpus: Corpus) -> TokenBudget:
    """The budgets that hold each sample of a corpus alone: a start refuses smaller ones.

    Both texts of a preference pair stand in one micro-batch. Where samples differ in media or
    spans, the sizes of media are read of those alone that may be larger than all before.
    """
    text, answers = corpus.config.max_text_tokens, corpus.config.answers
    llm, encoder = answers * text, 1
    for number, spans in enumerate(corpus.spans):
        if not corpus.media.varied[number]:
            tokens = sum(corpus.modalities[name].encoder_tokens for name in spans)
            most_spans = len(spans)
        else:
            most_spans, tokens = _measure_varied(corpus, number)
        llm = max(llm, answers * (text + SPAN_TOKENS * most_spans))
        encoder = max(encoder, tokens)
    return TokenBudget(llm, encoder)


def _measure_varied(corpus: Corpus, number: int) -> tuple[int, int]:
    """Most spans and most encoder tokens of a sample of a dataset whose samples differ."""
    per_span = np.array([m.encoder_tokens for m in corpus.modalities.values()], dtype=np.int64)
    most = tokens = 0
    for shard, info in enumerate(corpus.shards[number]):
        rows = np.arange(info.samples, dtype=np.int64)
        bound = corpus.media.count_at_most(number, shard, rows)
        rows = rows[(bound.sum(1) > most) | (bound @ per_span > tokens)]
        if not len(rows):
            continue
        zeros = np.zeros_like(rows)
        table = SampleTable(zeros + number, zeros + shard, rows, zeros, zeros, zeros)
        spans = corpus.media.count(table, np.arange(len(rows)))
        most = max(most, int(spans.sum(1).max(initial=0)))
        tokens = max(tokens, int((spans @ per_span).max(initial=0)))
    return most, tokens
