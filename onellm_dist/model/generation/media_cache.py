"""Encoding each medium once: the tokens of media are kept while memory for them lasts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from onellm_dist.model.placement import get_device

CACHE_BYTES = 256 * 1024**2
"""Memory of a MediaCache: some 1000 media of a 7B model in bf16."""


@dataclass(frozen=True)
class Medium:
    """One medium of a prompt.

    Attributes:
        modality: name of its modality.
        value: its model input [*value_shape], or a function that reads it when it is needed.
        key: what identifies it, so that its tokens can be reused; None: they are not.
        number: of several spans of one medium, which this is; the same key is another one then.
    """

    modality: str
    value: torch.Tensor | Callable[[], torch.Tensor]
    key: str | None = None
    number: int = 0

    @property
    def identity(self) -> tuple[str, str, int] | None:
        """What media with the same tokens share; None: the tokens are not reused."""
        return None if self.key is None else (self.modality, self.key, self.number)


class MediaCache:
    """Tokens [Q, d] of the media that were used last; several threads may share it.

    Args:
        max_bytes: most memory for them.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.encoded = 0
        """Media that were encoded."""
        self.reused = 0
        """Media whose tokens were there already."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._tokens: OrderedDict[tuple[str, str, int], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, medium: Medium) -> torch.Tensor | None:
        """Tokens of a medium; None if they are not kept."""
        identity = medium.identity
        with self._lock:
            if identity is None or identity not in self._tokens:
                return None
            self._tokens.move_to_end(identity)
            return self._tokens[identity]

    def put(self, medium: Medium, tokens: torch.Tensor) -> None:
        """Keep the tokens of a medium in place of those that were not used for longest."""
        identity = medium.identity
        if identity is None:
            return
        with self._lock:
            if identity not in self._tokens:
                self._bytes += _count_bytes(tokens)
            self._tokens[identity] = tokens
            while self._bytes > self._max_bytes:
                _, dropped = self._tokens.popitem(last=False)
                self._bytes -= _count_bytes(dropped)


def encode_media(
    model: Any, media: Sequence[Medium], cache: MediaCache | None = None
) -> list[torch.Tensor]:
    """Tokens [Q, d] of each medium, in order; media with the same key are encoded once.

    Args:
        model: a OneLLMForConditionalGeneration.
        media: the media.
        cache: keeps tokens between calls.
    """
    own = MediaCache() if cache is None else cache
    found: dict[object, torch.Tensor] = {}
    wanted: dict[object, Medium] = {}
    names: list[object] = [medium.identity or place for place, medium in enumerate(media)]
    for name, medium in zip(names, media, strict=True):
        if name in found or name in wanted:
            own.reused += 1
        elif (tokens := own.get(medium)) is not None:
            found[name] = tokens
            own.reused += 1
        else:
            wanted[name] = medium
    values: dict[str, list[torch.Tensor]] = {}
    numbers: dict[str, list[int]] = {}
    for medium in wanted.values():
        value = medium.value if isinstance(medium.value, torch.Tensor) else medium.value()
        values.setdefault(medium.modality, []).append(value)
        numbers.setdefault(medium.modality, []).append(medium.number)
    own.encoded += len(wanted)
    if not wanted and not (distributed.is_available() and distributed.is_initialized()):
        return [found[name] for name in names]
    device = get_device(model.llm)
    stacked = {name: torch.stack(rows).to(device) for name, rows in values.items()}
    # Without media too, among ranks: every one of a sharded model must run every module.
    tokens_by_modality, _ = model.encode(stacked, numbers)
    rows = {name: iter(tokens) for name, tokens in tokens_by_modality.items()}
    for name, medium in wanted.items():
        found[name] = next(rows[medium.modality])
        own.put(medium, found[name].clone())
    return [found[name] for name in names]


def _count_bytes(tokens: torch.Tensor) -> int:
    return tokens.numel() * tokens.element_size()
