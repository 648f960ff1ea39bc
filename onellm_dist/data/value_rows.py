"""The media values of a micro-batch, gathered in one tensor per modality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from onellm_dist.modalities import Modality


class ValueRows:
    """Copies values into the tensors of a micro-batch as they are read.

    A value is copied while the processor's cache still holds it, and its memory serves the next
    one. Stacking all of them at the end takes twice the time and twice the memory.

    Args:
        modalities: name to modality, in the order of the batch.
        spans: the modality of every span of the micro-batch, as planned.
    """

    def __init__(self, modalities: Mapping[str, Modality], spans: Iterable[str]) -> None:
        counts = Counter(spans)
        self._values = {
            name: torch.empty((counts[name], *modality.value_shape), dtype=modality.loader_dtype)
            for name, modality in modalities.items()
        }
        self._used = dict.fromkeys(modalities, 0)

    def add(self, values: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Add a sample's spans: modality to [*value_shape] of each, in the order of the sequence.

        Raises:
            IndexError: there are more than planned.
        """
        for name, rows in values.items():
            first = self._used[name]
            self._used[name] = first + len(rows)
            for row, value in enumerate(rows, first):
                self._values[name][row] = value

    def finish(self) -> dict[str, torch.Tensor]:
        """Return modality to [spans, *value_shape], of the modality's `loader_dtype`.

        Raises:
            RuntimeError: there are fewer than planned.
        """
        if missing := {n: len(v) for n, v in self._values.items() if self._used[n] != len(v)}:
            raise RuntimeError(f"spans planned: {missing}, read: {self._used}")
        return self._values
