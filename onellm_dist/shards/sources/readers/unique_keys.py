"""Keys for samples whose names differ only where a key may not: `22.05` and `22_05`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def make_keys_unique(keys: Iterable[str], first: Sequence[bool] | None = None) -> list[str]:
    """Number the keys that occur several times: `a`, `a-2`, `a-3`.

    Args:
        keys: of samples, in their order.
        first: which of them keep their key if others have it too; None: those that come first.

    Returns:
        Unique keys. One that is made up is never one of those given.
    """
    given = list(keys)
    known, seen = set(given), Counter[str]()
    order = sorted(range(len(given)), key=lambda i: first is not None and not first[i])
    unique = list(given)
    for i in order:
        key = given[i]
        seen[key] += 1
        if seen[key] == 1:
            continue
        while (numbered := f"{key}-{seen[key]}") in known:
            seen[key] += 1
        known.add(numbered)
        unique[i] = numbered
    return unique
