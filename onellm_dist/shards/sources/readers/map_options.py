"""The options of the sources of maps."""

from __future__ import annotations

from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities.io.alignment import MAP_ORIENTATIONS
from onellm_dist.shards.sources.base import Option
from onellm_dist.shards.sources.readers.img2dataset import UNFINISHED_OPTION


def make_map_options(kind: str) -> dict[str, Option]:
    """Make the options of the source of one kind of map."""
    options = {
        "images": Option(
            None, "the folder of the pictures; default: IN/cc3m if it exists, else IN", Path
        ),
        "maps": Option(
            None,
            f"the folder of the maps; default: IN/cc3m_{kind}, else the pictures' folder",
            Path,
        ),
        "captions": Option(
            None,
            "a table with the columns caption and url (a local path); "
            "default: x.txt is the caption of x.jpg",
            Path,
        ),
        "depth_model": Option(
            None,
            "make the maps here: the folder of a depth-estimation model of transformers (DPT, ...)",
            Path,
        ),
        "depth_is_distance": Option(
            False,
            "depth_model estimates distances (metric models), not inverse depth as DPT does; or "
            "depth maps that exist hold distances, in 16 bits or as floats",
            bool,
        ),
        "map_orientation": Option(
            None,
            "stored or upright: which pixels of pictures that are turned (EXIF) the maps were made "
            "from; default: where their sizes do not show it, the sample is bad",
        ),
        "unfinished": UNFINISHED_OPTION,
        "device": Option(
            "cpu",
            "where depth_model runs: cpu, or cuda (a few pixels differ from those of a CPU)",
        ),
    }
    if kind == "normal":
        options["strength"] = Option(
            0.5,
            "of normals from depth: the relief's height in shares of the picture's shorter side",
            float,
        )
    return options


def check_map_orientation(stated: str | None) -> None:
    """Check the option `map_orientation`.

    Raises:
        UsageError: it is none of MAP_ORIENTATIONS.
    """
    if stated not in (None, *MAP_ORIENTATIONS):
        raise UsageError(
            f"map_orientation={stated} is none of {', '.join(MAP_ORIENTATIONS)}.",
            "it says which pixels of turned pictures the maps were made from.",
            "choose one, or leave it out.",
        )
