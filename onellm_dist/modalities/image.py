"""Still images as 224 x 224 RGB with CLIP's normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from onellm_dist.common.media_size import MediaSize
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.drawing import make_thumbnail
from onellm_dist.modalities.io.pictures import (
    IMAGE_EXTENSIONS,
    decode_picture,
    encode_picture,
    make_rgb_picture,
    measure_picture,
)
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.pixels import PixelModality
from onellm_dist.modalities.transforms.crops import (
    PATCHES,
    SIDE,
    choose_crop_box,
    crop_eval,
    crop_train,
    make_picture,
    split_channels,
)
from onellm_dist.modalities.transforms.tiles import choose_grid, cut_tiles

_JPEG = b"\xff\xd8\xff"


class ImageModality(PixelModality):
    """Still images; the encoder's own patch embedding reads them.

    | | |
    |---|---|
    | files | `image`: jpg, jpeg, png, webp, gif, bmp, tif, tiff, avif |
    | raw signal | RGB `PIL.Image` |
    | model input | [3, 224, 224], CLIP's mean and standard deviation |
    | encoder tokens | 256 patches of 14 x 14 and the class token |
    | spans | one; of several, the whole picture and its tiles (`transforms/tiles.py`) |

    The bytes decide on the format, whatever the extension says; of several frames or pages the
    first is read. EXIF orientation is applied, transparency is composited on white. Texts and
    colour profiles in the file decide nothing.

    Of 16-bit values the upper 8 bits are kept. Cameras and scanners store 10, 12 or 14 bits in 16:
    white is what the file says then (TIFF's SMaxSampleValue or BitsPerSample, PNG's sBIT, PGM's
    maximum), else the fewest of 1, 2, 4, 8, 10, 12, 14 or 16 bits that hold its largest value; that
    is noted in the dataset's `damaged.jsonl` as `assumed`. 32-bit integers within 0..65535 are read
    alike.
    """

    name = "image"
    order = 0
    limits = LIMITS["image"]
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": IMAGE_EXTENSIONS}
    value_shape = (3, SIDE, SIDE)
    tokens = PATCHES
    visual = True

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Image.Image:
        """Decode to upright RGB (see `io.pictures.decode_picture`)."""
        return decode_picture(parts["image"], self.limits)

    def measure(self, parts: Mapping[str, Part]) -> MediaSize:
        """Read width and height, upright, without decoding pixels."""
        width, height = measure_picture(parts["image"], self.limits)
        return MediaSize(width=width, height=height)

    def has_header(self, start: bytes) -> bool:
        """JPEG alone: a PNG may state its orientation behind its pixels."""
        return start.startswith(_JPEG)

    def count_spans(self, size: MediaSize, most: int) -> int:
        """One span, or one for the whole picture and one for each tile of the best grid."""
        columns, rows = choose_grid(size.width, size.height, range(1, most))
        return 1 + columns * rows if columns * rows > 1 else 1

    def decode_spans(
        self, parts: Mapping[str, Part], meta: Mapping[str, Any], spans: int
    ) -> list[Image.Image]:
        """The whole picture, pressed into a square, and `spans - 1` tiles, row by row."""
        return cut_tiles(self.decode(parts, meta), spans - 1)

    def make_raw(self, item: Any) -> Any:
        """Take a `PIL.Image` of any mode, or its array, as `decode` takes a file."""
        return make_rgb_picture(item, self.limits)

    def make_parts(self, item: Any) -> dict[str, Part] | None:
        """The picture that `make_raw` makes, as a file."""
        picture = self.make_raw(item)
        return {"image": encode_picture(picture)} if isinstance(picture, Image.Image) else None

    def cut_pixels(
        self, raw: Image.Image, *, train: bool, rng: np.random.Generator
    ) -> torch.Tensor:
        """Crop to [3, 224, 224].

        Training takes a random crop of at least 0.9 of the area; evaluation resizes the short side
        to 224 and takes the middle.
        """
        if train:
            return split_channels(crop_train(raw, choose_crop_box(*raw.size, rng)))
        return split_channels(crop_eval(raw))

    def build_tokenizer(self, width: int) -> None:
        """Return None: the encoder reads pixels itself."""
        return

    def preview(self, raw: Image.Image) -> Image.Image:
        """The picture, at most 448 pixels a side."""
        return make_thumbnail(raw, 448)

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """The crop, 224 x 224."""
        return make_picture(value)


MODALITY = ImageModality()
