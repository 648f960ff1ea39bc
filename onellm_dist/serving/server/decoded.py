"""The media that were decoded last: a chat sends its pictures again with every turn."""

from __future__ import annotations

from collections import OrderedDict

import torch

KEPT_BYTES = 256 * 1024**2
"""Memory for decoded media: some 400 pictures in fp32."""


class DecodedMedia:
    """Model inputs by the hash of their files.

    Args:
        max_bytes: most memory for them.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, key: str) -> torch.Tensor | None:
        """The model input of a medium; None if it is not kept."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: str, value: torch.Tensor) -> None:
        """Keep a model input in place of those that were not used for longest."""
        if key in self._values:
            return
        self._values[key] = value
        self._bytes += value.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._values.popitem(last=False)[1].nbytes
