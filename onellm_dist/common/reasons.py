"""Comparing the reasons for which samples could not be read.

One bad sample is the data's fault. Where none can be read, and all for one reason, a library, the
environment or the recipe is the cause.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

MIN_SAMPLES = 8
"""Fewer samples say nothing about what they have in common."""
ALIKE = 0.9
"""Share of the reasons that are the same where samples fail alike."""


def normalise_reason(reason: str) -> str:
    """A reason without the sample's id, addresses and numbers, so that equal faults are equal."""
    text = reason.split(": ", 1)[1] if re.match(r"[^ ]*/[^ ]*@\d+: ", reason) else reason
    text = re.sub(r"0x[0-9a-f]+", "0x...", text)
    return re.sub(r"\d+", "N", text)


def find_shared_reason(reasons: Iterable[str]) -> str | None:
    """Find the reason that nearly all have in common; None if they differ, or are too few.

    Args:
        reasons: of samples that could not be read.

    Returns:
        The normalised reason, or what stands before its first colon: reasons begin with their
        category.
    """
    known = list(map(normalise_reason, reasons))
    for kinds in (Counter(known), Counter(reason.partition(":")[0] for reason in known)):
        common, count = kinds.most_common(1)[0] if kinds else ("", 0)
        if len(known) >= MIN_SAMPLES and count >= ALIKE * len(known):
            return common
    return None
