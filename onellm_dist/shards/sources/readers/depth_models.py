"""Depth and normal maps that a local depth-estimation model of transformers (DPT, ...) makes.

A map is a function of picture and model alone: one picture at a time, one thread, fp32. So equal
builds have equal bytes for any number of workers on one kind of processor. Another kind, or a GPU,
may round a few pixels differently.
"""

from __future__ import annotations

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
from torch.nn import functional

from onellm_dist.common.checksums import check_folder
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import sha256_file
from onellm_dist.common.remote_code import make_remote_code_error
from onellm_dist.common.workers.sandbox import decoding, unlimited
from onellm_dist.modalities import Part
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.pictures import open_picture
from onellm_dist.shards.sources.base import BadSampleError, Media
from onellm_dist.shards.sources.readers.media_files import get_write_stamp

_UPRIGHT = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0"
"""EXIF with the orientation 1 alone."""
_SCHARR = np.array([3.0, 10.0, 3.0]) / 16


@dataclass(frozen=True)
class EstimatedMap:
    """The map that a model makes of a picture, as a PNG of the picture's size."""

    picture: Media
    model: Path
    kind: str
    """`depth`: 8-bit grey from 0 (the farthest pixel) to 255 (nearest). `normal`: 8-bit RGB."""
    distance: bool = False
    """Whether the model estimates distances (metric models), not their inverse (DPT, MiDaS)."""
    strength: float = 0.5
    """Strength of the normals, see `estimate_normals`."""
    device: str = "cpu"

    def read_bytes(self) -> bytes:
        """Run the model.

        Raises:
            BadSampleError: the picture cannot be read, or its map is flat or not finite.
            UsageError: the model cannot be loaded.
        """
        data = self.picture.read_bytes()
        with decoding():
            return self._convert(data)

    def _convert(self, data: bytes) -> bytes:
        opened = open_picture(Part("jpg", data))
        picture = convert_to_rgb(opened.image)
        nearness = _to_nearness(_estimate(self.model, self.device, picture), self.distance)
        array = np.round(nearness * 255).astype(np.uint8)
        if self.kind == "normal":
            vectors = estimate_normals(nearness, self.strength)
            array = np.round((vectors + 1) * 127.5).astype(np.uint8)
        buffer = io.BytesIO()
        # The map of a picture that EXIF turns says that it is upright; others need not.
        tag = {"exif": _UPRIGHT} if opened.orientation > 1 else {}
        Image.fromarray(array).save(buffer, "PNG", **tag)
        return buffer.getvalue()


def check_model(folder: Path) -> dict[str, str]:
    """Check a model's folder.

    Returns:
        What the manifest says about the model: its name and the SHA-256 of its weights.

    Raises:
        UsageError: the folder does not hold a depth model of transformers, or one of its files
            is not what the folder's SHA256SUMS says.
    """
    weights = (
        sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin"))
        if folder.is_dir()
        else []
    )
    if not weights or not (folder / "config.json").is_file():
        raise UsageError(
            f"depth_model={folder}: there is no transformers model (config.json, weights).",
            "the maps are to be made with it; nothing is downloaded.",
            "name the folder of a depth-estimation model that save_pretrained wrote, "
            "such as a copy of Intel/dpt-large.",
        )
    check_folder(folder)
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING

    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError) as error:
        raise make_remote_code_error(folder, error) or _model_error(folder, error) from error
    if type(config) not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING:
        raise _model_error(folder, f"a {config.model_type} model does not estimate depth")
    return {"depth_model": folder.resolve().name, "depth_model_sha256": sha256_file(*weights)}


def _model_error(folder: Path, why: object) -> UsageError:
    return UsageError(
        f"depth_model={folder}: {why}.",
        "the maps are to be made with it.",
        "name a depth-estimation model of transformers.",
    )


@lru_cache(maxsize=1)
def _load(folder: Path, device: str, written: int) -> tuple[Any, Any]:
    """Image processor and model.

    `written` changes with the files, so that what the manifest says about the weights stays true.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # the builder shows its own
    with unlimited():
        return _load_unlimited(folder, device)


def _load_unlimited(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        model = AutoModelForDepthEstimation.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
        return processor, model.eval().to(device)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        raise make_remote_code_error(folder, error) or _model_error(folder, error) from error


def _estimate(folder: Path, device: str, picture: Image.Image) -> np.ndarray:
    """[height, width] fp64 at the picture's size (bicubic, as in transformers' depth pipeline)."""
    with _use_one_thread():
        processor, model = _load(
            folder, device, max(get_write_stamp(p) for p in (folder, *folder.iterdir()))
        )
        with torch.inference_mode(), _translate_device_errors(device):
            inputs = processor(images=picture, return_tensors="pt").to(device)
            found = model(**inputs).predicted_depth.float()
            found = found.reshape(1, 1, *found.shape[-2:])
            size = (picture.height, picture.width)
            depth = functional.interpolate(found, size=size, mode="bicubic", align_corners=False)
            return np.asarray(depth[0, 0].cpu().double().numpy())


@contextmanager
def _translate_device_errors(device: str) -> Iterator[None]:
    """Raise OneLLMError if a device fails or is full: that is not the fault of a picture."""
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
                "no picture is left out for this reason.",
                "build again with fewer workers; finished shards are kept.",
            ) from error
        raise


@contextmanager
def _use_one_thread() -> Iterator[None]:
    """Add in one order, whatever the number of cores and workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _to_nearness(values: np.ndarray, distance: bool) -> np.ndarray:
    """[H, W] in [0, 1]: 0 the farthest pixel, 1 the nearest.

    Raises:
        BadSampleError: all pixels are equal, or some are not finite.
    """
    if not np.isfinite(values).all():
        raise BadSampleError("no usable map: the model's depth is not finite")
    if distance:
        values = 1 / np.maximum(values, np.finfo(np.float32).eps)
    low, high = values.min(), values.max()
    if not high > low:
        raise BadSampleError("no usable map: the model sees no depth in the picture")
    scaled: np.ndarray = (values - low) / (high - low)
    return scaled


def estimate_normals(nearness: np.ndarray, strength: float) -> np.ndarray:
    """Estimate surface normals from nearness: x to the right, y up, z towards the viewer.

    The nearness is taken as a relief of height h = strength * min(H, W) * nearness (in pixels) over
    the picture plane, seen from straight above. The normal is (-dh/dx, dh/dy, 1), scaled to length
    1, with y counted down the picture. Slopes are Scharr's (central differences, smoothed across
    with 3-10-3), and edges are repeated. A depth model without scale and camera allows no more:
    angles are right up to `strength`. A wall that faces the camera is (0, 0, 1), a floor points up,
    and a surface that comes nearer towards the right faces left.

    Args:
        nearness: [H, W] in [0, 1].
        strength: height of the relief in shares of the shorter side.

    Returns:
        [H, W, 3] unit vectors.
    """
    height = np.pad(nearness * (strength * min(nearness.shape)), 1, mode="edge")
    across = (height[:, 2:] - height[:, :-2]) / 2
    down = (height[2:] - height[:-2]) / 2
    slope_x = sum(w * across[i : i + nearness.shape[0]] for i, w in enumerate(_SCHARR))
    slope_y = sum(w * down[:, i : i + nearness.shape[1]] for i, w in enumerate(_SCHARR))
    vectors = np.stack([-slope_x, slope_y, np.ones_like(nearness)], -1)
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit
