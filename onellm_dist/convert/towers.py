"""Encoders of timm and open_clip by name.

The names are `timm:NAME[?img_size=224][@FILE]` and `open-clip:NAME[@FILE or TAG]`. Without FILE,
weights come from where the library keeps them: the Hub, or its cache. The first time needs a
network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.checkpoint import OpenedCheckpoint
from onellm_dist.convert.tensors.lazy import from_tensor

_TOWER_NAME = re.compile(
    r"(?P<library>timm|open-clip):(?P<name>[^?@]+)(\?img_size=(?P<size>\d+))?(@(?P<weights>.+))?"
)


def is_tower(tower_name: str) -> bool:
    """Whether an `--encoder` names a tower rather than a path."""
    return tower_name.startswith(("timm:", "open-clip:"))


def open_tower(tower_name: str) -> OpenedCheckpoint:
    """Load a tower as an encoder, in memory.

    Raises:
        UsageError: the name is malformed or unknown, the weights cannot be read, or the encoder
            cannot run the tower.
    """
    from onellm_dist.model.weights.towers import convert_tower

    match = _TOWER_NAME.fullmatch(tower_name)
    if match is None:
        raise UsageError(
            f"--encoder {tower_name}",
            "it does not name a tower.",
            "write timm:NAME, timm:NAME?img_size=224, timm:NAME@FILE or open-clip:NAME@TAG.",
        )
    weights = match["weights"]
    if match["library"] == "timm" and weights is not None and not Path(weights).is_file():
        raise UsageError(
            f"--encoder {tower_name}: no file {weights}",
            "there are no weights to read.",
            "check the path.",
        )
    load = _load_timm if match["library"] == "timm" else _load_open_clip
    try:
        tower = load(match["name"], int(match["size"]) if match["size"] else None, weights)
        config, state = convert_tower(tower)
    except OneLLMError as error:
        raise UsageError(f"--encoder {tower_name}: {error.what}", error.why, error.do) from None
    except Exception as error:  # whatever the library or its download raises
        raise UsageError(
            f"--encoder {tower_name}: {type(error).__name__}: {error}",
            "the tower cannot be loaded.",
            "check the name; without a network give the weights: "
            f"{tower_name.partition('@')[0]}@FILE.",
        ) from error
    files = (Path(weights),) if weights is not None and Path(weights).is_file() else ()
    tensors = {name: from_tensor(value.detach()) for name, value in state.items()}
    return OpenedCheckpoint(
        match["library"], "encoder", config, tensors, files, Path(), notes={"tower": tower_name}
    )


def _load_timm(name: str, size: int | None, weights: str | None) -> Any:
    import timm

    options: dict[str, Any] = {} if size is None else {"img_size": size}
    if weights is None:
        return timm.create_model(name, pretrained=True, num_classes=0, **options)
    # Through timm's own filter, which renames the keys of DINOv2's files and resizes positions.
    # `custom_load` is how the original .npz files of some models are read (timm 1.0.22 to 1.0.31).
    source = {"file": weights, "hf_hub_id": None, "custom_load": weights.endswith(".npz")}
    return timm.create_model(
        name,
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay=source,
        **options,
    )


def _load_open_clip(name: str, size: int | None, weights: str | None) -> Any:
    import open_clip

    options: dict[str, Any] = {} if size is None else {"force_image_size": size}
    tag = weights or next(iter(open_clip.list_pretrained_tags_by_model(name)), None)
    if tag is None:
        raise UsageError(
            f"open_clip has no weights of {name}",
            "an untrained encoder reads nothing.",
            "give open-clip:NAME@FILE.",
        )
    return open_clip.create_model(name, pretrained=tag, **options)
