"""Reasons that samples have in common."""

from __future__ import annotations

import pytest

from onellm_dist.common.reasons import find_shared_reason, normalise_reason


def test_equal_faults_have_equal_reasons() -> None:
    one = "cc/train-000001/000000017@0: unreadable audio: RuntimeError: at 0x7ffe12 byte 17"
    other = "cc/train-000003/000000917@2: unreadable audio: RuntimeError: at 0x7aae12 byte 9"
    assert normalise_reason(one) == normalise_reason(other)
    assert normalise_reason(one) == "unreadable audio: RuntimeError: at Nx... byte N"


@pytest.mark.parametrize(
    ("reasons", "shared"),
    [
        ([f"missing file: {i}.jpg" for i in range(8)], "missing file: N.jpg"),
        ([f"missing file: {c}.jpg" for c in "abcdefgh"], "missing file"),
        ([f"missing file: {i}.jpg" for i in range(7)], None),
        ([*(f"missing file: {c}" for c in "abcdefgh"), "empty caption", "empty caption"], None),
        ([*(f"missing file: {c}" for c in "abcdefghi"), "empty caption"], "missing file"),
        ([], None),
    ],
)
def test_what_nearly_all_have_in_common(reasons: list[str], shared: str | None) -> None:
    assert find_shared_reason(reasons) == shared
