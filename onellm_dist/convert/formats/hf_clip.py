"""CLIP's visual transformer as transformers keeps it (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection), in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Plan, fitted, parameter_shapes
from onellm_dist.convert.formats.hf import read_config
from onellm_dist.convert.names.clip import from_hf, only_clip, to_hf
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import safetensor_shards, write_index
from onellm_dist.model.configuration import OneLLMVisionConfig
from onellm_dist.model.encoder import Encoder

NAME, KIND = "hf-clip", "encoder"
_KINDS = ("clip", "clip_vision_model")


def recognise(path: Path) -> bool:
    """A folder whose config.json is CLIP's."""
    config = read_config(path)
    return config is not None and config.get("model_type") in _KINDS


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open the directory `path`; the separate projections of queries, keys and values are joined.

    Raises:
        UsageError: not such a directory, or heads that cannot be.
    """
    about = read_config(path)
    if about is None or about.get("model_type") not in _KINDS:
        raise UsageError(
            f"{path} is no CLIP of transformers",
            "its config.json says otherwise or is missing.",
            "give such a directory.",
        )
    state, files = read_folder(path)
    vision: dict[str, Any] = about.get("vision_config") or about
    told: Any = CLIPVisionConfig(
        **{
            k: v
            for k, v in vision.items()
            if k not in ("model_type", "dtype", "torch_dtype", "architectures")
        }
    )
    if told.hidden_act not in ("quick_gelu", "gelu"):
        raise UsageError(
            f"{path}: activation {told.hidden_act}",
            "the encoder has quick_gelu and gelu.",
            "use another CLIP.",
        )
    projection = state.get("visual_projection.weight")
    config = OneLLMVisionConfig(
        width=told.hidden_size,
        layers=told.num_hidden_layers,
        heads=options.encoder_heads or told.num_attention_heads,
        mlp_ratio=told.intermediate_size / told.hidden_size,
        patch_size=told.patch_size,
        image_size=told.image_size,
        act=told.hidden_act,
        output_dim=projection.shape[0]
        if projection is not None
        else int(about.get("projection_dim", told.projection_dim)),
    )
    wanted = parameter_shapes(lambda: Encoder(config))
    given, used = from_hf(state, list(wanted))
    others = {k: t for k, t in state.items() if k not in used}
    visual = {
        k: (None, t)
        for k, t in others.items()
        if k.startswith(("vision_model.", "visual_projection"))
    }
    text = tuple(sorted(set(others) - set(visual)))
    tensors, ignored, problems = fitted(
        {**given, **visual}, wanted, ignore=lambda key: key.endswith("position_ids")
    )
    return Opened(NAME, KIND, config, tensors, files, path, (*ignored, *text), problems)


def plan(opened: Opened, options: Options) -> Plan:
    """A CLIPVisionModelWithProjection directory."""
    config: OneLLMVisionConfig = opened.config
    only_clip(config, NAME)
    files = safetensor_shards(list(to_hf(opened.tensors).items()), options.shard_bytes)

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
        write_index(folder, files)

    return Plan(files, finish)
