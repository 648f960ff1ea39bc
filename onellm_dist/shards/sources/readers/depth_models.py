"""Depth and normal maps made of pictures by a depth-estimation model of transformers (DPT and its like) from a local folder.

A map is a function of picture and model alone: one picture at a time, one thread, fp32. So equal builds have equal bytes for
any number of workers (on one kind of processor; another kind, or a GPU, may round a few pixels otherwise).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities import Part
from onellm_dist.modalities.io.pictures import decode_picture
from onellm_dist.shards.sources.base import BadSampleError, Media
from onellm_dist.shards.sources.readers.media_files import get_write_stamp

_SCHARR = np.array([3.0, 10.0, 3.0]) / 16


@dataclass(frozen=True)
class EstimatedMap:
    """The map that a model makes of a picture, as PNG of the picture's size."""

    picture: Media
    model: Path
    kind: str
    """`depth`: 8-bit grey, near is bright (0 to 255 from the farthest to the nearest pixel). `normal`: 8-bit RGB."""
    distance: bool = False
    """The model tells distances (metric models), not their inverse (DPT, MiDaS)."""
    strength: float = 0.5
    """Of `estimate_normals`."""
    device: str = "cpu"

    def read_bytes(self) -> bytes:
        """Runs the model.

        Raises:
            BadSampleError: the picture cannot be read, or its map is flat or not finite.
            UsageError: the model cannot be loaded.
        """
        picture = decode_picture(Part("jpg", self.picture.read_bytes()))
        nearness = _nearness(_estimate(self.model, self.device, picture), self.distance)
        array = np.round(nearness * 255).astype(np.uint8)
        if self.kind == "normal":
            array = np.round((estimate_normals(nearness, self.strength) + 1) * 127.5).astype(
                np.uint8
            )
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        return buffer.getvalue()


def check_model(folder: Path) -> dict[str, str]:
    """What the manifest says of a model: its name and the SHA-256 of its weights.

    Raises:
        UsageError: the folder holds no transformers depth model.
    """
    weights = (
        sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin"))
        if folder.is_dir()
        else []
    )
    if not weights or not (folder / "config.json").is_file():
        raise UsageError(
            f"depth_model={folder}: no transformers model lies there (config.json and weights).",
            "the maps are to be made with it; nothing is downloaded.",
            "give the folder of a depth-estimation model saved with save_pretrained, such as a copy of Intel/dpt-large.",
        )
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, OSError) as error:
        raise _unusable(folder, error) from error
    if type(config) not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING:
        raise _unusable(folder, f"a {config.model_type} model estimates no depth")
    digest = hashlib.sha256()
    for file in weights:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return {"depth_model": folder.resolve().name, "depth_model_sha256": digest.hexdigest()}


def _unusable(folder: Path, why: object) -> UsageError:
    return UsageError(
        f"depth_model={folder}: {why}.",
        "the maps are to be made with it.",
        "give a depth-estimation model of transformers.",
    )


@lru_cache(maxsize=1)
def _load(folder: Path, device: str, written: int) -> tuple[Any, Any]:
    """(image processor, model); `written` changes with the files, so that what the manifest says of the weights is true."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    from transformers.utils import logging

    logging.disable_progress_bar()  # the builder has one
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
        model = AutoModelForDepthEstimation.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32
        )
        return processor, model.eval().to(device)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        raise _unusable(folder, error) from error


def _estimate(folder: Path, device: str, picture: Image.Image) -> np.ndarray:
    """[height, width] fp64, at the picture's size (bicubic, as transformers' depth pipeline does it)."""
    with _one_thread():
        processor, model = _load(
            folder, device, max(get_write_stamp(p) for p in (folder, *folder.iterdir()))
        )
        with torch.inference_mode(), _on(device):
            found = model(
                **processor(images=picture, return_tensors="pt").to(device)
            ).predicted_depth.float()
            found = found.reshape(1, 1, *found.shape[-2:])
            size = (picture.height, picture.width)
            return np.asarray(
                torch.nn.functional.interpolate(
                    found, size=size, mode="bicubic", align_corners=False
                )[0, 0]
                .cpu()
                .double()
                .numpy()
            )


@contextmanager
def _on(device: str) -> Iterator[None]:
    """A device that fails or is full is no fault of a picture."""
    try:
        yield
    except RuntimeError as error:
        if (
            isinstance(error, torch.OutOfMemoryError)
            or "CUDA" in str(error)
            or "allocate memory" in str(error)
        ):
            raise OneLLMError(
                f"the depth model failed on {device}: {(str(error).splitlines() or [''])[0]}",
                "no picture is left out for that.",
                "build again with fewer workers; shards that were finished are kept.",
            ) from error
        raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of cores and workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _nearness(values: np.ndarray, distance: bool) -> np.ndarray:
    """[H, W] in [0, 1]: 0 the farthest pixel, 1 the nearest.

    Raises:
        BadSampleError: no pixel differs from another, or some are not finite.
    """
    if not np.isfinite(values).all():
        raise BadSampleError("no usable map: the model's depth is not finite")
    if distance:
        values = 1 / np.maximum(values, np.finfo(np.float32).eps)
    low, high = values.min(), values.max()
    if not high > low:
        raise BadSampleError("no usable map: the model sees no depth in the picture")
    return (values - low) / (high - low)


def estimate_normals(nearness: np.ndarray, strength: float) -> np.ndarray:
    """[H, W] nearness in [0, 1] -> [H, W, 3] unit vectors: x to the right, y up, z towards the viewer.

    The nearness is taken as a relief of height h = strength * min(H, W) * nearness (in pixels) over the picture plane, seen from
    straight above: n is (-dh/dx, dh/dy, 1) made a unit vector, y counted down the picture. Slopes are Scharr's (central
    differences smoothed with 3-10-3 across), edges repeated. A depth model without scale and camera allows no more: angles
    are right up to `strength`. A wall that faces the camera is (0, 0, 1), a floor points up, and what comes nearer to the right
    faces left.
    """
    height = np.pad(nearness * (strength * min(nearness.shape)), 1, mode="edge")
    across = (height[:, 2:] - height[:, :-2]) / 2
    down = (height[2:] - height[:-2]) / 2
    slope_x = sum(w * across[i : i + nearness.shape[0]] for i, w in enumerate(_SCHARR))
    slope_y = sum(w * down[:, i : i + nearness.shape[1]] for i, w in enumerate(_SCHARR))
    vectors = np.stack([-slope_x, slope_y, np.ones_like(nearness)], -1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
