"""Whether a map lies on the stored or on the upright pixels of its picture.

A camera stores pixels unturned and notes the orientation (EXIF). Tools that made the map either
followed the note or ignored it, and the map's size mostly shows which.
"""

from __future__ import annotations

import math

from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.io.pictures import UprightPicture, turn_picture

MAP_ORIENTATIONS = ("stored", "upright")
"""What `map_orientation` in a sample's `.json` may say: which pixels its map was made from."""
_SQUARE = 1.03
"""Ratio of long to short side up to which a size says nothing about its orientation."""
_TURNED_SIDEWAYS = (5, 6, 7, 8)


def align_map(
    rendered: Image.Image,
    picture: UprightPicture,
    *,
    is_tagged: bool,
    names: tuple[str, str],
    stated: str | None = None,
) -> Image.Image:
    """Turn a map as its picture was turned, if it was made from the stored pixels.

    Args:
        rendered: the map, upright by its own orientation tag if it has one.
        picture: the picture, upright.
        is_tagged: whether the map's file states an orientation, be it 1.
        names: what errors call the picture and the map.
        stated: one of MAP_ORIENTATIONS if the sample says which; the map's own tag goes first.

    Returns:
        The map, upright; its size is not changed otherwise.

    Raises:
        SampleError: one of them is upright and the other one lies on its side, or nothing shows
            whether the map was made from the stored or from the upright pixels.
    """
    upright = picture.image.size
    if is_tagged or picture.orientation == 1:
        if _get_side(rendered.size) * _get_side(upright) < 0:
            raise _make_error(rendered, picture, names, "one is upright, the other on its side")
        return rendered
    if stated is not None:
        turned = turn_picture(rendered, picture.orientation) if stated == "stored" else rendered
        if _get_side(turned.size) * _get_side(upright) < 0:
            what = f"map_orientation is {stated!r}, and so they lie across each other"
            raise _make_error(rendered, picture, names, what)
        return turned
    stored = upright[::-1] if picture.orientation in _TURNED_SIDEWAYS else upright
    if stored != upright and rendered.size in (stored, upright):
        lies_on_stored = rendered.size == stored
    elif _get_side(stored) * _get_side(upright) < 0 and _get_side(rendered.size):
        lies_on_stored = _get_side(rendered.size) == _get_side(stored)
    else:
        raise _make_error(
            rendered,
            picture,
            names,
            "it cannot be known whether the map is turned like the picture",
        )
    return turn_picture(rendered, picture.orientation) if lies_on_stored else rendered


def _get_side(size: tuple[int, int]) -> int:
    """1: wide; -1: high; 0: nearly square."""
    ratio = size[0] / size[1]
    return 0 if 1 / _SQUARE <= ratio <= _SQUARE else int(math.copysign(1, math.log(ratio)))


def _make_error(
    rendered: Image.Image, picture: UprightPicture, names: tuple[str, str], what: str
) -> SampleError:
    width, height = picture.image.size
    turned = f" upright (EXIF orientation {picture.orientation})" if picture.orientation > 1 else ""
    return SampleError(
        f"{names[0]} is {width} x {height} pixels{turned} and {names[1]} {rendered.width} x "
        f"{rendered.height}: {what}",
        "a map that does not lie on its picture would teach the model nothing.",
        'say which pixels the map was made from: "map_orientation": "stored" (as they lie in '
        'the file) or "upright" in the sample\'s json, or -o describe=map_orientation=stored for a '
        "whole build; or turn both upright and remove the orientation from the picture.",
    )
