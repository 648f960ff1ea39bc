"""CLIP's visual transformer in transformers' directories, in and out.

It reads CLIPModel, CLIPVisionModel and CLIPVisionModelWithProjection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    OpenedCheckpoint,
    OutputPlan,
    fit_tensors,
    get_parameter_shapes,
)
from onellm_dist.convert.folder_kinds import refuse_quantised
from onellm_dist.convert.formats.hf import read_config
from onellm_dist.convert.names.clip import from_hf, require_clip, to_hf
from onellm_dist.convert.pixels import read_pixels, refuse_other_act, write_pixels
from onellm_dist.convert.sidecar import choose_heads
from onellm_dist.convert.tensors.lazy import Tensors
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import split_into_files, write_index
from onellm_dist.model.configuration import OneLLMVisionConfig
from onellm_dist.model.encoder import Encoder

NAME = "hf-clip"
KIND = "encoder"
ORDER = 6
ABOUT = "A CLIP of transformers."
EXAMPLE = "clip-vit-large-patch14"
DEFAULT_TARGET = "open-clip"

_MODEL_TYPES = ("clip", "clip_vision_model")


def is_format(path: Path) -> bool:
    """Whether a path is a folder whose config.json is CLIP's."""
    config = read_config(path)
    return config is not None and config.get("model_type") in _MODEL_TYPES


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open the directory `path`; the separate projections of queries, keys and values are joined.

    Raises:
        UsageError: not such a directory, or an unknown activation.
    """
    raw = read_config(path)
    if raw is None or raw.get("model_type") not in _MODEL_TYPES:
        raise UsageError(
            f"{path} is not a CLIP of transformers",
            "its config.json is missing or of another model.",
            "give a directory of such a CLIP.",
        )
    refuse_quantised(path, raw)
    state, files = read_folder(path)
    config = _build_config(raw, state, options, path)
    wanted = get_parameter_shapes(lambda: Encoder(config))
    given, used = from_hf(state, list(wanted))
    others = {key: tensor for key, tensor in state.items() if key not in used}
    visual = {
        key: (None, tensor)
        for key, tensor in others.items()
        if key.startswith(("vision_model.", "visual_projection"))
    }
    text_keys = tuple(sorted(set(others) - set(visual)))
    tensors, ignored, problems = fit_tensors(
        {**given, **visual}, wanted, ignore=lambda key: key.endswith("position_ids")
    )
    return OpenedCheckpoint(
        NAME, KIND, config, tensors, files, path, (*ignored, *text_keys), problems
    )


def _build_config(
    raw: dict[str, Any], state: Tensors, options: ConversionOptions, path: Path
) -> OneLLMVisionConfig:
    """Our config for transformers' config.json of a CLIP."""
    vision: dict[str, Any] = raw.get("vision_config") or raw
    dropped = ("model_type", "dtype", "torch_dtype", "architectures")
    try:
        theirs: Any = CLIPVisionConfig(**{k: v for k, v in vision.items() if k not in dropped})
        mlp_ratio = theirs.intermediate_size / theirs.hidden_size
        eps = float(theirs.layer_norm_eps)
    except Exception as error:  # whatever values of any kind make transformers raise
        raise UsageError(
            f"{path}/config.json: {(str(error).splitlines() or [type(error).__name__])[0][:200]}",
            "the encoder's sizes are in it.",
            "download it again.",
        ) from None
    if theirs.hidden_act not in ("quick_gelu", "gelu"):
        raise UsageError(
            f"{path}: activation {theirs.hidden_act}",
            "the encoder has quick_gelu and gelu.",
            "use another CLIP.",
        )
    stated = path / "config.json"
    heads = choose_heads(
        "--encoder-heads", options.encoder_heads, theirs.num_attention_heads, stated
    )
    refuse_other_act(options, theirs.hidden_act, stated)
    projection = state.get("visual_projection.weight")
    mean, std = read_pixels(path)
    return OneLLMVisionConfig(
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=heads or theirs.num_attention_heads,
        mlp_ratio=mlp_ratio,
        patch_size=theirs.patch_size,
        image_size=theirs.image_size,
        act=theirs.hidden_act,
        norm_eps=eps,
        image_mean=mean,
        image_std=std,
        output_dim=projection.shape[0]
        if projection is not None
        else int(raw.get("projection_dim", theirs.projection_dim)),
    )


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """A CLIPVisionModelWithProjection directory.

    Raises:
        UsageError: the encoder has not CLIP's form.
    """
    config: OneLLMVisionConfig = opened.config
    require_clip(config, NAME)
    files = split_into_files(list(to_hf(opened.tensors).items()), options.shard_bytes)

    def finish(folder: Path) -> None:
        theirs = CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.output_dim or 0,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.act,
            layer_norm_eps=1e-5,
        )
        theirs.architectures = ["CLIPVisionModelWithProjection"]
        theirs.dtype = opened.dtype
        theirs.save_pretrained(folder)
        write_pixels(folder, config)
        write_index(folder, files)

    return OutputPlan(files, finish)
