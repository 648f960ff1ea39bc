"""Maps and trees of CC3M pictures, as people have them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from shard_worlds import foreign_tar, write_tree
from source_checks import make_photo


def grey_map(size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """A map that is brighter to the right."""
    pixels = np.tile(np.linspace(0, 255, size[0]).astype(np.uint8), (size[1], 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def colour_map(side: int = 384) -> bytes:
    """Omnidata's pictures are squares of 512 (depth) and 384 (normal)."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, side)
    pixels[..., 2] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parallel(root: Path, kind: str) -> Path:
    """cc3m/00000/*.jpg + *.txt beside cc3m_<kind>/00000/*."""
    files: dict[str, bytes | str] = {}
    for i in range(5):
        files[f"cc3m/00000/00000000{i}.jpg"] = make_photo(seed=i)
        files[f"cc3m/00000/00000000{i}.txt"] = f"caption {i}\n"
    files["cc3m/00001/000010000.JPG"] = make_photo((48, 64), 7)
    files["cc3m/00001/000010000.txt"] = "upright"
    for i in range(5):
        files[f"cc3m_{kind}/00000/00000000{i}.{'jpg' if i == 1 else 'png'}"] = grey_map(
            kind="JPEG" if i == 1 else "PNG"
        )
    files[f"cc3m_{kind}/00001/000010000.png"] = grey_map((48, 64))
    return write_tree(root, files)


def img2dataset_tar(
    root: Path, name: str, count: int = 4, cut: int = 0, stats: bool = True
) -> None:
    members: list[tuple[str, bytes]] = []
    for i in range(count):
        key = f"{name}{i:04d}"
        status = {
            "caption": f"c{i}",
            "url": f"http://x/{i}",
            "key": key,
            "status": "success",
            "error_message": None,
        }
        members += [
            (f"{key}.jpg", make_photo(seed=i)),
            (f"{key}.json", json.dumps(status).encode()),
            (f"{key}.txt", f"caption {i}".encode()),
        ]
    tar = foreign_tar(root / f"{name}.tar", members)
    if cut:
        tar.write_bytes(tar.read_bytes()[:-cut])
    if stats:
        (root / f"{name}_stats.json").write_text("{}")
