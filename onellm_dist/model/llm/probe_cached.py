"""Whether texts that an LLM continues as the rows of a batch get what each gets alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from onellm_dist.model.llm.cached import CachedRows, decode, prefill
from onellm_dist.model.llm.call import LLMSupport
from onellm_dist.model.llm.probe import (
    LENGTHS,
    NEW_TOKENS,
    TOLERANCE,
    ProbeError,
    Reference,
    build_llm,
    differ,
    find_difference,
)


def find_cached(reference: Reference, support: LLMSupport) -> LLMSupport:
    """Add to an LLM's support whether texts can be continued as the rows of a batch.

    Args:
        reference: the LLM's own forward of each sample alone.
        support: how it runs exactly.
    """
    if support.packing != "varlen" or not support.padding or not support.generation:
        return replace(support, cached=False)
    found = find_difference(probe_cached, reference, support)
    return replace(support, cached=found is None)


@torch.no_grad()
def probe_cached(reference: Reference, support: LLMSupport) -> None:
    """Compare the logits of continued texts with forwards of each text so far, alone.

    Raises:
        ProbeError: logits differ.
    """
    llm = build_llm(reference.config, support.attention, reference.gain)
    texts = list(reference.samples)
    ids = torch.cat(texts)
    logits, rows = prefill(
        llm,
        support,
        llm.get_input_embeddings()(ids),
        token_ids=ids,
        lengths=LENGTHS,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
    )
    kept = list(range(len(texts)))
    for step in range(NEW_TOKENS):
        tokens = logits.argmax(-1)
        for row, text in enumerate(kept):
            expected = reference.run(texts[text])[-1]
            if (off := differ(logits[row], expected)) > TOLERANCE:
                raise ProbeError(f"a continued text has other logits than alone ({off:.1%})")
            texts[text] = torch.cat([texts[text], tokens[row, None]])
        if step == 1:  # the longest text ends
            kept, rows, tokens = kept[1:], _drop_first(rows), tokens[1:]
        logits = decode(llm, rows, tokens)


def _drop_first(rows: CachedRows) -> CachedRows:
    return rows.keep(range(1, len(rows.lengths)))
