"""The middle square of a picture, for maps that show only that."""

from __future__ import annotations

import io
from dataclasses import dataclass

from onellm_dist.common.errors import SampleError
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities import Part
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.pictures import open_picture
from onellm_dist.shards.sources.base import Media

_QUALITY = 95


@dataclass(frozen=True)
class CentreSquare:
    """The middle square of a picture as JPEG.

    Omnidata's demo shows its model this square (Resize, then CenterCrop).
    """

    picture: Media

    def read_bytes(self) -> bytes:
        """Cut out the square as JPEG of quality 95; it is not resized.

        Raises:
            SampleError: the picture cannot be read, or is turned by its EXIF orientation.
        """
        data = self.picture.read_bytes()
        with decoding():
            return self._cut(data)

    def _cut(self, data: bytes) -> bytes:
        opened = open_picture(Part("jpg", data))
        if opened.orientation > 1:
            raise SampleError(
                f"the picture has EXIF orientation {opened.orientation}, and its map is a square",
                "it cannot be known whether the map was made from the turned picture.",
                "put the picture that the model was shown beside the map, as NAME_rgb.png.",
            )
        picture = convert_to_rgb(opened.image)
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        buffer = io.BytesIO()
        picture.crop((left, top, left + side, top + side)).save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()
