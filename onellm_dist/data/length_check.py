"""Checks before step 0 that every sample fits, and that there is something to learn.

Both follow from the token counts; no text and no medium is read. Counts are opened only where the
recipe leaves the answer open: texts are cut to `data.max_text_tokens`, so with large enough budgets
no sample can be too long, and a dataset with a supervised token in its first shard needs no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.data.corpus import Corpus
from onellm_dist.data.micro_batch import Ints, SampleRef, SampleTable
from onellm_dist.data.token_budget import UNLIMITED, read_budget
from onellm_dist.data.token_counts import UNREADABLE
from onellm_dist.modalities.base import SPAN_TOKENS

log = get_logger(__name__)
_CONTEXT = "the LLM's context (positions)"
CENSUS_SHARDS = 100
"""Shards of a dataset whose samples without a supervised token are counted."""


class Limit(NamedTuple):
    """The largest number of LLM positions of a sample."""

    name: str
    """The key, or the property of the model, that sets it."""
    positions: int
    do: str
    """What a user does about it."""


def check_corpus(corpus: Corpus, *, positions: int | None = None) -> None:
    """Refuse a corpus with a sample that fits in no micro-batch, or with nothing to learn.

    Args:
        corpus: the datasets of the run.
        positions: positions that the LLM knows; None: any number.

    Raises:
        UsageError: a sample is longer than a budget or the LLM's positions, or a dataset has no
            supervised token. All problems are listed.
    """
    problems: list[UsageError] = []
    for number in range(len(corpus.datasets)):
        problems += _find_too_large(corpus, number, positions)
        problems += _find_unsupervised(corpus, number)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError(
            f"{len(problems)} problems with the samples of data.mixture\n"
            + "\n".join(f"  - {p.what}; {p.do}" for p in problems),
            "no step could be trained as the recipe says.",
            "change the keys that the lines name.",
        )


def check_batch(corpus: Corpus, samples: SampleTable, *, positions: int | None) -> None:
    """Refuse a batch with a sample that is longer than the LLM's positions.

    Args:
        corpus: the datasets of the samples.
        samples: any samples of them.
        positions: positions that the LLM knows; None: any number.

    Raises:
        UsageError: a sample is longer; the longest is named.
    """
    if positions is None:
        return
    spans = np.array([len(names) for names in corpus.spans], dtype=np.int64)[samples.dataset]
    varied = np.flatnonzero(corpus.media.varied[samples.dataset])
    if varied.size:
        spans[varied] = corpus.media.count(samples, varied).sum(1)
    texts = _bound_text(corpus, samples.text_tokens)
    lengths = SPAN_TOKENS * spans + texts
    if not (lengths > positions).any():
        return
    at = int(lengths.argmax())
    (longest,) = samples.refs(np.array([at]))
    if corpus.config.preference_pairs:
        size, fixed = int(lengths[at]), SPAN_TOKENS * int(spans[at])
        raise _describe_pair(corpus, longest, _CONTEXT, size, positions, fixed)
    longest = longest._replace(text_tokens=int(texts[at]))
    found = TooLong(longest, int((lengths > positions).sum()), len(lengths))
    raise _describe(corpus, found, _limit_positions(positions), SPAN_TOKENS * int(spans[at]))


@dataclass(frozen=True)
class TooLong:
    """Samples that are longer than a limit."""

    longest: SampleRef
    count: int
    """How many samples are longer than the limit."""
    total: int
    """How many samples there are."""


def _limit_positions(positions: int) -> Limit:
    return Limit(_CONTEXT, positions, "use an LLM with more positions")


def _find_too_large_varied(
    corpus: Corpus, number: int, positions: int | None
) -> Iterator[UsageError]:
    """Find too large samples of a dataset whose samples differ in media or spans.

    Sizes of media are read of those samples alone that might be too large.
    """
    config = corpus.config
    if positions is None and read_budget(config) == UNLIMITED:
        return
    limit = Limit("data.pack_llm_tokens", read_budget(config).llm, "raise data.pack_llm_tokens")
    if positions is not None and positions < limit.positions:
        limit = _limit_positions(positions)
    per_span = np.array([m.encoder_tokens for m in corpus.modalities.values()], dtype=np.int64)
    longest, largest = TooLong(SampleRef(number, 0, 0, 0, 0, 0), 0, 0), (0, SampleRef(0, *[0] * 5))
    most = fixed = 0
    for shard in range(len(corpus.shards[number])):
        rows, counts = corpus.token_counts.get_texts(number, shard)
        longest = replace(longest, total=longest.total + len(np.unique(rows)))
        bound = corpus.media.count_at_most(number, shard, rows)
        may = (counts[:, 0] + SPAN_TOKENS * bound.sum(1) > limit.positions) | (
            bound @ per_span > read_budget(config).encoder
        )
        rows, counts = rows[may], counts[may]
        if not len(rows):
            continue
        zeros = np.zeros_like(rows)
        text, supervised = counts.astype(np.int64).T
        table = SampleTable(zeros + number, zeros + shard, rows, zeros, text, supervised)
        spans = corpus.media.count(table, np.arange(len(rows)))
        lengths, encoder = text + SPAN_TOKENS * spans.sum(1), spans @ per_span
        refs = table.refs(np.array([lengths.argmax(), encoder.argmax()]))
        # a sample of several captions has several rows
        count = longest.count + len(np.unique(rows[lengths > limit.positions]))
        longest = replace(longest, count=count)
        if lengths.max() > most:
            most, fixed = int(lengths.max()), SPAN_TOKENS * int(spans[lengths.argmax()].sum())
            longest = replace(longest, longest=refs[0])
        largest = max(largest, (int(encoder.max()), refs[1]))
    if longest.count:
        yield _describe(corpus, longest, limit, fixed)
    if largest[0] > read_budget(config).encoder:
        yield UsageError(
            f"sample {corpus.sample_id(largest[1])} ({corpus.describe_media(largest[1])}) needs "
            f"{largest[0]} encoder tokens; data.pack_encoder_tokens is "
            f"{read_budget(config).encoder}",
            "a micro-batch holds whole samples, so it does not fit in any.",
            f"raise data.pack_encoder_tokens to {largest[0]} or more, or lower data.spans",
        )


def _bound_text(corpus: Corpus, text_tokens: Ints) -> Ints:
    """Text tokens of a sequence; of a pair at most, whose counts are those of both sequences."""
    if not corpus.config.preference_pairs:
        return text_tokens
    return np.asarray(np.minimum(text_tokens - 1, corpus.config.max_text_tokens))


def _may_be_too_large(corpus: Corpus, number: int, positions: int | None) -> bool:
    """Whether a pair of a dataset may be too large, by the recipe alone."""
    config, budget = corpus.config, read_budget(corpus.config)
    if corpus.media.varied[number]:
        return positions is not None or budget != UNLIMITED
    spans = corpus.spans[number]
    longest = config.max_text_tokens + SPAN_TOKENS * len(spans)
    return (
        2 * longest > budget.llm
        or sum(corpus.modalities[name].encoder_tokens for name in spans) > budget.encoder
        or (positions is not None and longest > positions)
    )


def _find_too_large_pairs(
    corpus: Corpus, number: int, positions: int | None
) -> Iterator[UsageError]:
    """Find too large preference pairs: both texts of a pair stand in one micro-batch."""
    if not _may_be_too_large(corpus, number, positions):
        return
    budget = read_budget(corpus.config)
    per_span = np.array([m.encoder_tokens for m in corpus.modalities.values()], dtype=np.int64)
    own = np.array([corpus.spans[number].count(m) for m in corpus.modalities], dtype=np.int64)

    def measure(text: Ints, spans: Ints) -> list[tuple[str, Ints, int]]:
        fixed = SPAN_TOKENS * spans.sum(1)
        limits = [
            ("data.pack_llm_tokens", text + 2 * fixed, budget.llm),
            ("data.pack_encoder_tokens", spans @ per_span, budget.encoder),
        ]
        if positions is not None:
            limits.append((_CONTEXT, _bound_text(corpus, text) + fixed, positions))
        return limits

    largest: dict[str, tuple[int, UsageError]] = {}
    for shard in range(len(corpus.shards[number])):
        rows, counts = corpus.token_counts.get_texts(number, shard)
        text, supervised = counts.astype(np.int64).T
        spans: Ints = own + np.zeros_like(rows)[:, None]
        if corpus.media.varied[number]:
            spans = corpus.media.count_at_most(number, shard, rows)
        may = np.any([sizes > limit for _, sizes, limit in measure(text, spans)], axis=0)
        if not may.any():
            continue
        rows, text, supervised, spans = rows[may], text[may], supervised[may], spans[may]
        zeros = np.zeros_like(rows)
        table = SampleTable(zeros + number, zeros + shard, rows, zeros, text, supervised)
        if corpus.media.varied[number]:
            spans = corpus.media.count(table, np.arange(len(rows)))
        for name, sizes, limit in measure(text, spans):
            at = int(sizes.argmax())
            size = int(sizes[at])
            if size > max(limit, largest.get(name, (0,))[0]):
                (ref,) = table.refs(np.array([at]))
                fixed = SPAN_TOKENS * int(spans[at].sum())
                largest[name] = size, _describe_pair(corpus, ref, name, size, limit, fixed)
    yield from (problem for _, problem in largest.values())


def _describe_pair(
    corpus: Corpus, ref: SampleRef, name: str, size: int, limit: int, fixed: int
) -> UsageError:
    """The problem of a pair that needs `size`; `fixed` positions of a text are its media's."""
    what = f"preference pair {corpus.sample_id(ref)} ({corpus.describe_media(ref)})"
    if name.startswith("data."):
        return UsageError(
            f"{what} needs {format_count(size, 'token')}; {name} is {limit}",
            "both of its texts stand in one micro-batch.",
            f"raise {name} to {size} or more"
            + (", or lower data.max_text_tokens." if name == "data.pack_llm_tokens" else "."),
        )
    shorten = (
        f"lower data.max_text_tokens to {limit - fixed} (longer texts are cut)"
        if limit - fixed > 1
        else f"leave out media: their spans alone take {fixed} positions"
    )
    return UsageError(
        f"{what} may need {format_count(size, 'token')}; {name} is {limit}",
        "it knows no later position, and either text of a pair may be so long: the token counts "
        "say how long both are together.",
        f"{shorten}, or use an LLM with more positions.",
    )


def _find_too_large(corpus: Corpus, number: int, positions: int | None) -> Iterator[UsageError]:
    if corpus.config.preference_pairs:
        yield from _find_too_large_pairs(corpus, number, positions)
        return
    if corpus.media.varied[number]:
        yield from _find_too_large_varied(corpus, number, positions)
        return
    config, spans = corpus.config, corpus.spans[number]
    media = ", ".join(spans) or "text"
    encoder = sum(corpus.modalities[name].encoder_tokens for name in spans)
    if encoder > read_budget(config).encoder:
        yield UsageError(
            f"every sample of dataset {corpus.datasets[number].name} ({media}) needs {encoder} "
            f"encoder tokens; data.pack_encoder_tokens is "
            f"{read_budget(config).encoder}",
            "a micro-batch holds whole samples, so none of them fits in any.",
            f"raise data.pack_encoder_tokens to {encoder} or more",
        )
    limit = Limit("data.pack_llm_tokens", read_budget(config).llm, "raise data.pack_llm_tokens")
    if positions is not None and positions < limit.positions:
        limit = _limit_positions(positions)
    fixed = SPAN_TOKENS * len(spans)
    if fixed + config.max_text_tokens <= limit.positions:
        return
    found = _find_too_long(corpus, number, limit.positions - fixed)
    if found.count:
        yield _describe(corpus, found, limit, fixed)


def _describe(corpus: Corpus, found: TooLong, limit: Limit, fixed: int) -> UsageError:
    """The problem of a dataset's samples that are longer than a limit.

    Args:
        corpus: the datasets.
        found: the samples.
        limit: what they exceed.
        fixed: positions of a sample's media spans.
    """
    ref = found.longest
    media = corpus.describe_media(ref)
    needed = fixed + ref.text_tokens
    text = limit.positions - fixed
    shorten = (
        f"lower data.max_text_tokens to {text}"
        if text > 1
        else f"leave out media: their spans alone take {fixed} positions"
    )
    key = limit.name.startswith("data.")
    return UsageError(
        f"sample {corpus.sample_id(ref)} ({media}, "
        f"{format_count(ref.text_tokens, 'text token')}) needs "
        f"{format_count(needed, 'token')}; {limit.name} is {limit.positions} ({found.count} of "
        f"{found.total} "
        f"samples of the dataset {'are' if found.count > 1 else 'is'} too long)",
        "a micro-batch holds whole samples, so these do not fit in any."
        if key
        else "it knows no later position.",
        f"{limit.do} to {needed} or more, or {shorten}."
        if key
        else f"{shorten} (longer texts are cut), or {limit.do}.",
    )


def _find_too_long(corpus: Corpus, number: int, most: int) -> TooLong:
    """The samples of a dataset with more than `most` text tokens, in the longest of their texts."""
    longest, ref, count, total = -1, SampleRef(number, 0, 0, 0, 0, 0), 0, 0
    for shard in range(len(corpus.shards[number])):
        rows, counts = corpus.token_counts.get_texts(number, shard)
        if not len(counts):
            continue
        total += len(np.unique(rows))
        count += len(np.unique(rows[counts[:, 0] > most]))
        at = int(counts[:, 0].argmax())
        text, supervised = (int(value) for value in counts[at])
        if text > longest:
            longest = text
            ref = SampleRef(number, shard, int(rows[at]), 0, text, supervised)
    return TooLong(ref, count, total)


def _find_unsupervised(corpus: Corpus, number: int) -> Iterator[UsageError]:
    """A problem where no sample has a supervised token; a warning where some have none."""
    samples = without = unreadable = 0
    some = False
    # Of a remote dataset each shard is a request.
    census = CENSUS_SHARDS if corpus.datasets[number].remote is None else 1
    for shard in range(len(corpus.shards[number])):
        if some and shard >= census:
            break
        rows, counts = corpus.token_counts.get_texts(number, shard)
        some = some or bool(counts[:, 1].any())
        best = np.zeros(int(rows[-1]) + 1 if len(rows) else 0, dtype=np.int64)
        np.maximum.at(best, rows, counts[:, 1].astype(np.int64))
        samples += len(best)
        without += int((best == 0).sum())
        unreadable += int((counts == np.asarray(UNREADABLE)).all(axis=1).sum())
    if not without:
        return
    name, config = corpus.datasets[number].name, corpus.config
    share = f"{without} of {samples}"
    reasons = []
    if unreadable:
        reasons.append(
            f"{unreadable} have no text that data.text_format={config.text_format} can read"
        )
    if without > unreadable:
        reasons.append(
            f"{without - unreadable} lose their answer to "
            f"data.max_text_tokens={config.max_text_tokens}"
        )
    if some:
        log.warning("dataset %s: %s samples teach nothing: %s", name, share, "; ".join(reasons))
        return
    yield UsageError(
        f"dataset {name}: none of its {format_count(samples, 'sample')} has a supervised token: "
        + "; ".join(reasons),
        "training on it would change nothing.",
        "raise data.max_text_tokens, use another data.text_format, or remove the dataset.",
    )
