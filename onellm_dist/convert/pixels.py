"""What a CLIP's folder says beside its weights: the pixels it was trained on, its activation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.folder_kinds import read_json
from onellm_dist.model.configuration import OneLLMVisionConfig

PREPROCESSOR = "preprocessor_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Pixels = tuple[list[float] | None, list[float] | None]
"""(mean, standard deviation) by channel; None: CLIP's own."""


def read_pixels(folder: Path) -> Pixels:
    """The normalisation of pixels in preprocessor_config.json.

    Raises:
        UsageError: the file cannot be read.
    """
    path = folder / PREPROCESSOR
    if not path.is_file():
        return None, None
    found = read_json(path)
    if found is None:
        raise UsageError(
            f"{path} is not a JSON object",
            "the normalisation of the pixels is in it.",
            "download it again, or remove it if it is CLIP's own.",
        )
    return choose_pixels(found.get("image_mean"), found.get("image_std"), path)


def choose_pixels(mean: Any, std: Any, source: Path) -> Pixels:
    """Mean and deviation as the encoder's config has them.

    Args:
        mean: three numbers; None: CLIP's.
        std: three positive numbers; None: CLIP's.
        source: where they stand, for the error.

    Raises:
        UsageError: they are something else.
    """
    for values, least in ((mean, -1e3), (std, 1e-6)):
        if values is not None and not (
            isinstance(values, list)
            and len(values) == 3
            and all(type(v) in (int, float) and least <= v < 1e3 for v in values)
        ):
            raise UsageError(
                f"{source}: mean or deviation of the pixels is {str(values)[:80]}",
                "three numbers are needed, one a channel.",
                "correct it.",
            )
    return (
        None if mean is None or _is_near(mean, CLIP_MEAN) else [float(v) for v in mean],
        None if std is None or _is_near(std, CLIP_STD) else [float(v) for v in std],
    )


def _is_near(values: list[float], own: tuple[float, ...]) -> bool:
    return all(abs(a - b) < 1e-4 for a, b in zip(values, own, strict=True))


def write_pixels(folder: Path, config: OneLLMVisionConfig) -> None:
    """Write preprocessor_config.json for an encoder.

    Args:
        folder: the folder.
        config: config of the encoder.
    """
    side = config.image_size
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.image_mean or list(CLIP_MEAN),
        "image_std": config.image_std or list(CLIP_STD),
    }
    (folder / PREPROCESSOR).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_other_act(options: ConversionOptions, stated: str, source: Path) -> None:
    """Refuse an --act that contradicts what a checkpoint states.

    Args:
        options: what the user chose.
        stated: the checkpoint's activation.
        source: where it stands, for the error.

    Raises:
        UsageError: they differ.
    """
    if options.act is not None and options.act != stated:
        raise UsageError(
            f"--act {options.act}, but {source} says {stated}",
            "the wrong activation gives wrong numbers everywhere and no error.",
            "leave --act out; or correct the file, if it is of other weights.",
        )
