"""The contract of a modality. One file in this folder is one modality.

To add a modality, write one module: a subclass of `Modality`, and `MODALITY`, an instance of it.
Put the module into this folder, or name it in another package's entry points (group
`onellm_dist.modalities`, see `registry.py`). Builder, training, `onellm generate`, previews and
evaluation then accept it without further changes. The class says:

| member | what it says |
|---|---|
| `name`, `order` | its name in recipes, and where its span stands among the spans of a sample |
| `required_parts`, `optional_parts` | which files a sample needs, by role, and their extensions |
| `decode` | bytes of these files -> the raw signal, any object (a picture, a wave, an array) |
| `transform` | raw signal -> the model's input, fp32 of the shape `value_shape` |
| `build_tokenizer` | the trainable module, [n, *value_shape] -> [n, L, width] |
| `tokens` | L, how many tokens this module makes of one sample |
| `preview` | raw signal -> an RGB picture of it for people |
| `draw_value` | the model's input -> an RGB picture of it (optional: by default a heat map) |

    class Thermal(Modality):
        name = "thermal"
        order = 8                      # the eight of the paper have 0 to 7
        required_parts = {"thermal": ("thermal.npy",)}
        value_shape = (1, 64, 64)      # degrees Celsius
        tokens = 16

        def decode(self, parts, meta): ...
        def transform(self, raw, *, train, rng): ...
        def build_tokenizer(self, width): ...
        def preview(self, raw): ...

    MODALITY = Thermal()

The base class has no units: `decode` and `transform` say in their docstrings which units they read
and return. Bytes that are not media of the modality raise SampleError, never another exception:
the builder then leaves the sample out, and training replaces it by an empty one.

Shape legend of the whole package: B batch; n samples of one modality in a pack; T packed tokens (or
frames, where a modality has several); L tokens of one encoder sequence without the class token;
D encoder width; H heads; E experts; Q queries (30); d LLM width; V vocabulary; S LLM sequence.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.common.errors import SampleError
from onellm_dist.common.media_size import MediaSize
from onellm_dist.modalities.drawing import draw_heatmap
from onellm_dist.modalities.library_faults import translate_errors
from onellm_dist.modalities.limits import Limits, check_input
from onellm_dist.modalities.meta_keys import MetaKey

if TYPE_CHECKING:
    from PIL import Image

QUERY_TOKENS = 30
"""Modality tokens that the UPM passes to the LLM for each span (paper, appendix C.1)."""
SPAN_TOKENS = QUERY_TOKENS + 2
"""LLM positions of one span: start tag, 30 tokens, end tag."""


@dataclass(frozen=True)
class Part:
    """One file of a sample.

    Attributes:
        extension: the extension in the tar, lower-case, without the first dot (`jpg`, `depth.png`).
        data: the bytes of the file.
    """

    extension: str
    data: bytes


class Modality(ABC):
    """A kind of signal that the model reads. Subclasses have no state."""

    name: ClassVar[str]
    """The name in recipes, shards and placeholders (`<image>`)."""
    order: ClassVar[int]
    """Where the span of this modality stands in the LLM sequence (image 0 to fmri 7). Unique."""
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]]
    """The parts that a sample must have: role to accepted extensions, the most specific first. The
    first role is filled by `onellm generate --NAME FILE`."""
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The parts that a sample may have, in the same form."""
    value_shape: ClassVar[tuple[int, ...]]
    """Shape of one sample's model input, without the batch dimension."""
    frames: ClassVar[int] = 1
    """Encoder sequences per sample; their outputs are averaged (video 15, depth and normal 2)."""
    tokens: ClassVar[int]
    """L: encoder tokens of one sequence, without the class token."""
    prefix_tokens: ClassVar[int] = 1
    """Tokens that the encoder puts before them: the class token, in some encoders registers too."""
    visual: ClassVar[bool] = False
    """Whether the encoder's own frozen patch embedding reads the input; no tokenizer then."""
    meta_keys: ClassVar[Mapping[str, MetaKey]] = {}
    """The keys of a sample's `.json` that say how its media are read, as `depth_is_distance`; only
    those that may hold for a whole dataset."""
    augments_spans: ClassVar[bool] = False
    """Whether training augments each of several spans of a medium too."""
    limits: ClassVar[Limits] = Limits()
    """How large its media may be; those of this package are in `limits.LIMITS`."""

    @property
    def encoder_tokens(self) -> int:
        """Packed encoder tokens of one sample, class tokens included."""
        return self.frames * (self.prefix_tokens + self.tokens)

    @property
    def upm_tokens(self) -> int:
        """Packed UPM tokens of one sample, queries included."""
        return self.prefix_tokens + self.tokens + QUERY_TOKENS

    def with_encoder(self, *, patches: int, prefix_tokens: int) -> Modality:
        """Return a copy with the token counts that a given encoder produces; nothing else differs.

        Args:
            patches: patches of one picture; they replace `tokens` of visual modalities.
            prefix_tokens: class token and registers.
        """
        sized = copy.copy(self)
        tokens = patches if self.visual else self.tokens
        vars(sized).update(prefix_tokens=prefix_tokens, tokens=tokens)
        return sized

    @abstractmethod
    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        """Decode bytes to the raw signal that `transform` and `preview` take.

        Args:
            parts: role to part; every required role is present.
            meta: the sample's `.json`, or an empty mapping.

        Raises:
            SampleError: the bytes cannot be read as media of this modality.
        """

    @abstractmethod
    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """Turn the raw signal into the model's input, fp32 of the shape `value_shape`.

        Args:
            raw: what `decode` returned; it must not be changed.
            train: whether to augment.
            rng: seeded by the caller from the sample's id and epoch; used only if `train`.

        Raises:
            SampleError: the signal cannot take this modality's shape (too short, wrong channels,
                values that are not finite).
        """

    @abstractmethod
    def build_tokenizer(self, width: int) -> nn.Module | None:
        """Build the trainable module [n, *value_shape] -> [n, L, width]; None if `visual`.

        The module must accept n = 0 and keep its parameters in the autograd graph then. It must not
        have buffers that a checkpoint needs.

        Args:
            width: D, the encoder's width.
        """

    @abstractmethod
    def preview(self, raw: Any) -> Image.Image:
        """Draw the raw signal as people look at it: frames, a spectrogram, a rendered cloud."""

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """Draw a model input (`value_shape`) for people; by default its numbers as colours."""
        return draw_heatmap(value.reshape(-1, value.shape[-1]).numpy(), (448, 224))

    def make_value(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """Transform the raw signal and check the result: what every user of a model input calls.

        Args:
            raw: what `decode` returned.
            train: whether to augment.
            rng: as of `transform`.

        Returns:
            fp32 of the shape `value_shape`, finite and within `limits.magnitude`.

        Raises:
            SampleError: as of `transform`, or a value is not finite or implausibly large.
        """
        value = self.transform(raw, train=train, rng=rng)
        check_input(self.limits, value, self.name)
        return value

    @property
    def loader_dtype(self) -> torch.dtype:
        """The dtype of `make_loader_value`: fp32, or uint8 (`pixels.PixelModality`)."""
        return torch.float32

    def make_loader_value(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """What the loader carries to the model of a raw signal; by default that of `make_value`."""
        return self.make_value(raw, train=train, rng=rng)

    def measure(self, parts: Mapping[str, Part]) -> MediaSize:
        """Read from its headers how large a medium is: what decides how many spans it takes.

        Args:
            parts: role to part.

        Raises:
            SampleError: the headers cannot be read.
        """
        return MediaSize()

    def has_header(self, start: bytes) -> bool:
        """Whether `measure` reads nothing behind the beginning of a file, or else raises."""
        return False

    def count_spans(self, size: MediaSize, most: int) -> int:
        """Say how many spans a medium takes: 1 .. most. By default one.

        Args:
            size: what `measure` read; zeros where it is not known.
            most: `data.spans`.
        """
        return 1

    def decode_spans(
        self, parts: Mapping[str, Part], meta: Mapping[str, Any], spans: int
    ) -> list[Any]:
        """Decode a medium to the raw signal of each of several spans.

        Args:
            parts: as of `decode`.
            meta: as of `decode`.
            spans: at least 2; what `count_spans` said.

        Raises:
            SampleError: as of `decode`.
        """
        raise SampleError(
            f"a medium of modality {self.name} takes one span, not {spans}",
            "the index was made by another program.",
            "index the dataset again: onellm shards index --media.",
        )

    def read_spans(
        self,
        parts: Mapping[str, Part],
        meta: Mapping[str, Any],
        *,
        spans: int,
        train: bool,
        rng: np.random.Generator,
        for_loader: bool = False,
    ) -> list[torch.Tensor]:
        """Decode and transform a medium to the model's input for each of its spans.

        Args:
            parts: as of `decode`.
            meta: as of `decode`.
            spans: how many.
            train: as of `transform`.
            rng: as of `transform`.
            for_loader: whether to return what `make_loader_value` makes.

        Raises:
            SampleError: as of `decode` and `make_value`.
        """
        make = self.make_loader_value if for_loader else self.make_value
        if spans == 1:
            return [make(self.decode(parts, meta), train=train, rng=rng)]
        raws = self.decode_spans(parts, meta, spans)
        augment = train and self.augments_spans
        return [make(raw, train=augment, rng=rng) for raw in raws]

    def make_raw(self, item: Any) -> Any:
        """Take a signal that a program holds in memory, instead of a file, as the raw signal.

        Args:
            item: an object that this modality knows, such as a picture of any mode; others are
                returned as they are.

        Raises:
            SampleError: the object cannot be media of this modality.
        """
        return item

    def make_parts(self, item: Any) -> dict[str, Part] | None:
        """Encode what `make_raw` takes as files, without loss; None: it takes one span anyway."""
        return None

    def is_one_medium(self, items: Sequence[Any]) -> bool:
        """Whether a list or tuple is one medium, as the frames of a film are, and not several.

        Args:
            items: the list.
        """
        return False

    def read_raw(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        """Decode, with every fault of the file as a SampleError: what previews call.

        Args:
            parts: as of `decode`.
            meta: as of `decode`.

        Raises:
            SampleError: as of `decode`, or a decoder failed in a way of its own.
        """
        with translate_errors(self.name):
            return self.decode(parts, meta)

    def read_value(
        self,
        parts: Mapping[str, Part],
        meta: Mapping[str, Any],
        *,
        train: bool,
        rng: np.random.Generator,
    ) -> torch.Tensor:
        """Decode, transform and check: from the bytes of a sample to the model's input.

        Args:
            parts: as of `decode`.
            meta: as of `decode`.
            train: as of `transform`.
            rng: as of `transform`.

        Raises:
            SampleError: as of `decode` and `make_value`, or a decoder failed in a way of its own.
        """
        with translate_errors(self.name):
            return self.make_value(self.decode(parts, meta), train=train, rng=rng)

    def match(self, extensions: Mapping[str, Any] | set[str]) -> dict[str, str]:
        """Choose the parts of a sample that this modality reads.

        Args:
            extensions: all extensions that the sample has.

        Returns:
            Role to extension; optional roles only where the sample has them.

        Raises:
            SampleError: a required role has no part.
        """
        found: dict[str, str] = {}
        for role, accepted in {**self.required_parts, **self.optional_parts}.items():
            hit = next((e for e in accepted if e in extensions), None)
            if hit is not None:
                found[role] = hit
            elif role in self.required_parts:
                present = ", ".join(sorted(extensions)) or "nothing"
                raise SampleError(
                    f"no {role} part for modality {self.name}: the sample has {present}",
                    "the sample cannot be read as this modality.",
                    f"add one of: {', '.join('.' + e for e in accepted)}.",
                )
        return found

    def read_parts(self, path: Path) -> dict[str, Part]:
        """Read the parts of one sample from files on disk (`onellm generate --NAME FILE`).

        The file fills the first role. The others are read from files beside it that are called
        `<stem>.<extension>`.

        Raises:
            SampleError: there is no file for a required role.
        """
        first = next(iter(self.required_parts))
        parts = {first: Part(path.name.split(".", 1)[-1].lower(), path.read_bytes())}
        stem = path.name.split(".", 1)[0]
        for role, accepted in {**self.required_parts, **self.optional_parts}.items():
            if role in parts:
                continue
            candidates = (path.with_name(f"{stem}.{e}") for e in accepted)
            neighbour = next((p for p in candidates if p.exists()), None)
            if neighbour is not None:
                extension = neighbour.name.split(".", 1)[-1].lower()
                parts[role] = Part(extension, neighbour.read_bytes())
            elif role in self.required_parts:
                raise SampleError(
                    f"{path}: modality {self.name} needs a {role} file too",
                    f"there is no {stem}.{{{','.join(accepted)}}} beside it.",
                    f"put the {role} file there under one of these names.",
                )
        return parts
