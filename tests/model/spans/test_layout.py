"""The LLM sequence of a pack against a walk over its rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.spans.layout import PackedLayout

KNOWN = ("image", "video", "audio")
SAMPLES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.sampled_from(KNOWN), max_size=3)), max_size=6
)


@given(SAMPLES)
def test_every_position_is_where_a_walk_puts_it(samples: list[tuple[int, list[str]]]) -> None:
    lengths, modalities = [n for n, _ in samples], [spans for _, spans in samples]
    text = [("text", i, t) for i, n in enumerate(lengths) for t in range(n)]
    tokens = [
        (m, i, r, q)
        for m in KNOWN
        for i, spans in enumerate(modalities)
        for r, name in enumerate(spans)
        if name == m
        for q in range(30)
    ]
    table = [*text, *tokens, *((m, edge) for m in KNOWN for edge in ("start", "end"))]
    walk: list[tuple[object, ...]] = []
    places: dict[tuple[object, ...], int] = {}
    for i, (n, spans) in enumerate(samples):
        sequence: list[tuple[object, ...]] = [("text", i, 0)]
        for r, m in enumerate(spans):
            sequence += [(m, "start"), *((m, i, r, q) for q in range(30)), (m, "end")]
        sequence += [("text", i, t) for t in range(1, n)]
        places |= {row: len(walk) + p for p, row in enumerate(sequence)}
        walk += sequence

    layout = PackedLayout.build(lengths, modalities, KNOWN)
    assert [table[g] for g in layout.gather] == walk
    assert layout.lengths == tuple(n + 32 * len(spans) for n, spans in samples)
    assert layout.position_ids.tolist() == [p for n in layout.lengths for p in range(n)]
    assert layout.counts == {m: sum(spans.count(m) for spans in modalities) for m in KNOWN}
    assert [p for p, row in zip(layout.predictor, text, strict=True) if row[2]] == [
        places[row] - 1 for row in text if row[2]
    ]


@pytest.mark.parametrize(
    ("lengths", "modalities", "message"),
    [
        ([3], [], "1 token count but modalities of 0"),
        ([2, 0], [[], []], r"samples \[1\]"),
        ([2], [["smell"]], "the pack has smell"),
    ],
)
def test_a_pack_that_cannot_be_is_refused(
    lengths: list[int], modalities: list[list[str]], message: str
) -> None:
    with pytest.raises(OneLLMError, match=message):
        PackedLayout.build(lengths, modalities, KNOWN)
