"""Pictures of what the model sees: its inputs, not the files that they were made from."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from onellm_dist.modalities import get_modality
from onellm_dist.modalities.drawing import join_pictures

if TYPE_CHECKING:
    import torch
    from PIL import Image

KEPT_SECONDS = 12 * 3600
"""How long pictures, and the files that users sent, are kept."""


def draw_spans(modality: str, values: Sequence[torch.Tensor]) -> Image.Image:
    """Draw the spans of a medium, side by side.

    Args:
        modality: its modality.
        values: the model's input for each span.
    """
    drawn = [get_modality(modality).draw_value(value) for value in values]
    return drawn[0] if len(drawn) == 1 else join_pictures(drawn)


def save_picture(folder: Path, picture: Image.Image) -> Path:
    """Save a picture as PNG under a name that its content gives it, and drop old ones.

    Args:
        folder: the folder of all pictures.
        picture: the picture.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    path = folder / f"{hashlib.sha256(buffer.getvalue()).hexdigest()}.png"
    path.write_bytes(buffer.getvalue())
    oldest = time.time() - KEPT_SECONDS
    for other in folder.glob("*.png"):
        with suppress(OSError):  # another thread was faster
            if other.stat().st_mtime < oldest:
                other.unlink()
    return path
