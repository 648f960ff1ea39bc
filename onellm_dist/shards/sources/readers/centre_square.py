"""The middle square of a picture, for maps that show only that."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities import Part
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.pictures import ORIENTATION_TAG, open_picture, turn_back
from onellm_dist.shards.sources.base import Media

_QUALITY = 95


@dataclass(frozen=True)
class CentreSquare:
    """The middle square of a picture as JPEG.

    Omnidata's demo shows its model this square (Resize, then CenterCrop).
    """

    picture: Media
    map_orientation: str | None = None
    """Which pixels of a turned picture its map was made from, stored or upright; None: unknown."""

    def read_bytes(self) -> bytes:
        """Cut out the square as JPEG of quality 95; it is not resized.

        If the map was made from the stored pixels, so is the square, with the picture's EXIF
        orientation.

        Raises:
            SampleError: the picture cannot be read, or is turned by its EXIF orientation and
                nobody says which pixels its map was made from.
        """
        data = self.picture.read_bytes()
        with decoding():
            return self._cut(data)

    def _cut(self, data: bytes) -> bytes:
        opened = open_picture(Part("jpg", data))
        if opened.orientation > 1 and self.map_orientation is None:
            raise SampleError(
                f"the picture has EXIF orientation {opened.orientation}, and its map is a square",
                "it cannot be known whether the map was made from the turned picture.",
                "say which pixels the maps were made from (-o map_orientation=stored or upright), "
                "or put the picture that the model was shown beside the map, as NAME_rgb.png.",
            )
        picture = convert_to_rgb(opened.image)
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        buffer = io.BytesIO()
        square = picture.crop((left, top, left + side, top + side))
        if self.map_orientation == "stored" and opened.orientation > 1:
            # As the camera stored it, so that the picture's note turns it and its map alike.
            exif = Image.Exif()
            exif[ORIENTATION_TAG] = opened.orientation
            stored = turn_back(square, opened.orientation)
            stored.save(buffer, "JPEG", quality=_QUALITY, exif=exif)
        else:
            square.save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()
