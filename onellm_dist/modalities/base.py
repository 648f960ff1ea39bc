"""The contract of a modality. One file in this folder is one modality; adding a ninth is adding one file.

A modality knows how its media is decoded from the parts of a sample, how it becomes the model's input, which module turns
that input into encoder tokens, and how a person looks at it.

Shape legend (the whole package): B batch, n samples of one modality in a pack, T packed tokens (or frames, where a
modality has several), L tokens of one encoder sequence without the class token, D encoder width, H heads, E experts,
Q queries (30), d LLM width, V vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.common.errors import SampleError

if TYPE_CHECKING:
    from PIL import Image

QUERY_TOKENS = 30
"""Modality tokens the UPM hands to the LLM for each run (paper, appendix C.1)."""
SPAN_TOKENS = QUERY_TOKENS + 2
"""LLM positions of one run: start tag, 30 tokens, end tag."""


@dataclass(frozen=True)
class Part:
    """One file of a sample: the extension it has in the tar (`jpg`, `depth.png`), and its bytes."""

    extension: str
    data: bytes


class Modality(ABC):
    """One kind of signal. Subclasses are stateless; each module in this package exposes one instance as `MODALITY`."""

    name: ClassVar[str]
    order: ClassVar[int]
    """Place of this modality's run in the LLM sequence (image 0 ... fmri 7)."""
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]]
    """The parts a sample needs, by role: the accepted extensions of each, most specific first.

    The first slot is the one `onellm generate --NAME FILE` fills."""
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    value_shape: ClassVar[tuple[int, ...]]
    """Shape of one sample's model input, without the batch dimension."""
    frames: ClassVar[int] = 1
    """Encoder sequences a sample makes; their outputs are averaged (video 15, depth and normal 2)."""
    tokens: ClassVar[int]
    """L: encoder tokens of one sequence, without the class token."""
    prefix_tokens: ClassVar[int] = 1
    """Tokens that the encoder puts before them: the class token (and registers, in some encoders)."""
    visual: ClassVar[bool] = False
    """True: the encoder's own (frozen) patch embedding and positions are used, and `tokenizer` returns None."""

    @property
    def encoder_tokens(self) -> int:
        """Packed encoder tokens of one sample (class tokens included)."""
        return self.frames * (self.prefix_tokens + self.tokens)

    @property
    def upm_tokens(self) -> int:
        """Packed UPM tokens of one sample (queries included)."""
        return self.prefix_tokens + self.tokens + QUERY_TOKENS

    def under(self, *, patches: int, prefix: int) -> Modality:
        """This modality as an encoder with so many patches a picture and prefix tokens counts it. Only counts differ."""
        sized = copy.copy(self)
        vars(sized).update(prefix_tokens=prefix, tokens=patches if self.visual else self.tokens)
        return sized

    @abstractmethod
    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        """Bytes to the raw signal that `transform` and `preview` take.

        Args:
            parts: slot name to part; every required slot is there.
            meta: the sample's `.json`, or an empty mapping.

        Raises:
            SampleError: the bytes are no readable media of this modality.
        """

    @abstractmethod
    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """The raw signal to the model's input, fp32 of `value_shape`.

        `rng` is seeded by the caller from the sample's id and epoch, and is drawn from only where `train` is true.

        Raises:
            SampleError: the signal cannot have this modality's shape (too short, wrong channels, not finite).
        """

    @abstractmethod
    def tokenizer(self, width: int) -> nn.Module | None:
        """The trainable module [n, *value_shape] -> [n, L, width], or None where `visual`.

        It must accept n = 0 and stay in the autograd graph then, and hold no buffers that a checkpoint needs.
        """

    @abstractmethod
    def preview(self, raw: Any) -> Image.Image:
        """An RGB picture of the raw signal as people look at it (frames, spectrogram, rendered cloud, traces)."""

    def match(self, extensions: Mapping[str, Any] | set[str]) -> dict[str, str]:
        """Slot to extension for a sample that has these extensions; a required slot that is missing is an error.

        Raises:
            SampleError: a required slot has no part.
        """
        found: dict[str, str] = {}
        for slot, accepted in {**self.required_parts, **self.optional_parts}.items():
            hit = next((e for e in accepted if e in extensions), None)
            if hit is not None:
                found[slot] = hit
            elif slot in self.required_parts:
                raise SampleError(
                    f"no {slot} part for modality {self.name}: the sample has {', '.join(sorted(extensions)) or 'nothing'}",
                    "the sample cannot be read as this modality.",
                    f"give it one of: {', '.join('.' + e for e in accepted)}.",
                )
        return found

    def parts_from_file(self, path: Path) -> dict[str, Part]:
        """The parts for one file given by hand (`onellm generate --NAME FILE`).

        The default fills the first slot and, for slots that are missing, looks beside the file for
        `<stem>.<extension>`. Raises SampleError where a required slot stays empty.
        """
        first = next(iter(self.required_parts))
        parts = {first: Part(path.name.split(".", 1)[-1].lower(), path.read_bytes())}
        stem = path.name.split(".", 1)[0]
        for slot, accepted in {**self.required_parts, **self.optional_parts}.items():
            if slot in parts:
                continue
            beside = next(
                (p for e in accepted if (p := path.with_name(f"{stem}.{e}")).exists()), None
            )
            if beside is not None:
                parts[slot] = Part(beside.name.split(".", 1)[-1].lower(), beside.read_bytes())
            elif slot in self.required_parts:
                raise SampleError(
                    f"{path}: modality {self.name} needs a {slot} file too",
                    f"no {stem}.{{{','.join(accepted)}}} stands beside it.",
                    f"put the {slot} file there under one of these names.",
                )
        return parts
