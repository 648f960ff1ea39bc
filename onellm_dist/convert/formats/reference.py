"""The reference's checkpoints (csuhan/OneLLM at 8587a47), in one or several files, in and out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    OpenedCheckpoint,
    OutputPlan,
    fit_tensors,
    get_parameter_shapes,
)
from onellm_dist.convert.names.clip import require_clip
from onellm_dist.convert.names.llama import (
    ROTARY_TABLE,
    build_params,
    check_heads,
    get_rotary_heads,
    to_halves,
    to_pairs,
)
from onellm_dist.convert.names.model_parallel import find_numbered_files, merge_files
from onellm_dist.convert.names.reference import (
    MODALITIES,
    from_reference_name,
    to_reference_name,
)
from onellm_dist.convert.tensors.lazy import Shapes, Tensors
from onellm_dist.convert.tensors.writers import TensorFile
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration

NAME = "reference"
KIND = "onellm"
ORDER = 1
ABOUT = "OneLLM's own consolidated.00-of-01.pth (or all of its model-parallel files), keys llma.*."
EXAMPLE = "consolidated.00-of-01.pth"
DEFAULT_TARGET = "onellm"

PREFIX = "llma."
"""What the reference puts before every key."""
ENCODER_HEAD_WIDTH = 64
"""Channels of a head of the encoder at the paper's size; a checkpoint does not state heads."""
UPM_HEAD_WIDTH = 64
"""Channels of a head of the UPM at the paper's size."""
LLM_HEAD_WIDTH = 128
"""Channels of a head of the LLM at the paper's size."""
REFERENCE_POSITIONS = 4096
"""Length of the reference's rotary table: twice its max_seq_len of 2048."""

_UNUSED = re.compile(
    r"clip\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight"
    r"|ln_final\.(weight|bias))"
)
"""CLIP's text tower without its blocks: it is in every checkpoint, and nothing uses it."""


def is_format(path: Path) -> bool:
    """Whether a path is a consolidated file, or a folder of them, with the reference's keys."""
    try:
        first = find_numbered_files(path)[:1]
        keys = merge_files(first, width_of=None)
    except (UsageError, OSError):
        return False
    return any(key.startswith(f"{PREFIX}resample_") for key in keys)


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open `consolidated.00-of-01.pth`, all of `-of-NN`, or safetensors of the same keys.

    Sizes are read from the shapes. Heads come from `params.json` beside the file if there is one,
    else from the usual widths of a head.

    Args:
        path: the file, the first of several files, or their folder.
        options: the numbers of heads.

    Raises:
        UsageError: not such a checkpoint, or impossible numbers of heads.
    """
    files = find_numbered_files(path)
    merged = merge_files(files, width_of=f"{PREFIX}layers.0.attention.wq.weight")
    state = {key.removeprefix(PREFIX): tensor for key, tensor in merged.items()}
    params = _read_params(files[0])
    config = build_config_from_shapes(
        {key: tensor.shape for key, tensor in state.items()},
        files[0],
        options.encoder_heads,
        options.upm_heads,
        options.llm_heads or params.get("n_heads"),
    )
    text = config.text_config
    table = next((t for key, t in state.items() if ROTARY_TABLE.fullmatch(key)), None)
    check_heads("--llm-heads", text.num_attention_heads, text.hidden_size, table)
    wanted = get_parameter_shapes(lambda: OneLLMForConditionalGeneration(config))
    given = {f"{PREFIX}{key}": (from_reference_name(key), t) for key, t in state.items()}
    tensors, ignored, problems = fit_tensors(given, wanted, ignore=_is_unused)
    for name in tensors:
        if heads := get_rotary_heads(name, text):
            tensors[name] = to_halves(tensors[name], heads)
    notes = {"model-parallel files": len(files)} if len(files) > 1 else {}
    root = files[0].parent
    return OpenedCheckpoint(NAME, KIND, config, tensors, files, root, ignored, problems, notes)


def _is_unused(key: str) -> bool:
    bare = key.removeprefix(PREFIX)
    return bool(_UNUSED.fullmatch(bare) or ROTARY_TABLE.fullmatch(bare))


def _read_params(file: Path) -> dict[str, Any]:
    """`params.json` beside a file; empty if there is none."""
    path = file.with_name("params.json")
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}", "the number of heads is in it.", "fix or remove it."
        ) from None


def build_config_from_shapes(
    shapes: Shapes,
    source: Path,
    encoder_heads: int | None,
    upm_heads: int | None,
    llm_heads: int | None,
) -> OneLLMConfig:
    """The config that a checkpoint's shapes imply; experts, blocks and layers are counted.

    Args:
        shapes: key without `llma.` -> shape.
        source: the checkpoint, for the error.
        encoder_heads: heads of the encoder; default: of the usual width.
        upm_heads: heads of the UPM; default: of the usual width.
        llm_heads: heads of the LLM; default: of the usual width.

    Raises:
        UsageError: a key that a size is read from is missing, or heads do not divide a width.
    """
    reader = _ShapeReader(shapes, source)
    text = _build_text_config(reader, llm_heads)
    vision = _build_vision_config(reader, encoder_heads)
    upm = OneLLMUPMConfig(
        experts=reader.count(r"resample_layers\.(\d+)\."),
        blocks=reader.count(r"resample_layers\.0\.(\d+)\."),
        heads=_get_heads("--upm-heads", upm_heads, vision.width, UPM_HEAD_WIDTH),
        ffn=reader.shape("resample_layers.0.0.feed_forward.w1.weight")[0],
        router_hidden=reader.shape("routers.image.fc1.weight")[0],
    )
    names = [ours for theirs, ours in MODALITIES.items() if f"resample_tokens.{theirs}" in shapes]
    return OneLLMConfig(vision=vision, upm=upm, text_config=text, modalities=names)


class _ShapeReader:
    """Reads sizes from the shapes of a checkpoint."""

    def __init__(self, shapes: Shapes, source: Path) -> None:
        self._shapes = shapes
        self._source = source

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a key that must be there."""
        if key not in self._shapes:
            raise UsageError(
                f"{self._source}: no key {PREFIX}{key}",
                "the sizes are read from it.",
                "give a complete checkpoint of the reference's code.",
            )
        return self._shapes[key]

    def count(self, pattern: str) -> int:
        """How many different numbers the group of a pattern matches in the keys."""
        return len({m[1] for key in self._shapes if (m := re.match(pattern, key))})


def _build_vision_config(reader: _ShapeReader, heads: int | None) -> OneLLMVisionConfig:
    width, _, patch, _ = reader.shape("clip.visual.conv1.weight")
    positions = reader.shape("clip.visual.positional_embedding")[0]
    hidden = reader.shape("clip.visual.transformer.resblocks.0.mlp.c_fc.weight")[0]
    return OneLLMVisionConfig(
        width=width,
        layers=reader.count(r"clip\.visual\.transformer\.resblocks\.(\d+)\."),
        heads=_get_heads("--encoder-heads", heads, width, ENCODER_HEAD_WIDTH),
        mlp_ratio=hidden / width,
        patch_size=patch,
        image_size=patch * round((positions - 1) ** 0.5),
        output_dim=reader.shape("clip.visual.proj")[1],
    )


def _build_text_config(reader: _ShapeReader, heads: int | None) -> LlamaConfig:
    vocabulary, width = reader.shape("tok_embeddings.weight")
    heads = _get_heads("--llm-heads", heads, width, LLM_HEAD_WIDTH)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=reader.shape("layers.0.feed_forward.w1.weight")[0],
        num_hidden_layers=reader.count(r"layers\.(\d+)\."),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=REFERENCE_POSITIONS,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def _get_heads(label: str, given: int | None, width: int, head_width: int) -> int:
    heads = max(1, width // head_width) if given is None else given
    check_heads(label, heads, width)
    return heads


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """`consolidated.00-of-01.pth` for the reference's code, and its `params.json`.

    Raises:
        UsageError: the model has a part that the reference does not know.
    """
    config: OneLLMConfig = opened.config
    require_clip(config.vision, NAME)
    params = build_params(config.text_config)
    _require_same_code(opened, params)
    tensors: Tensors = {}
    try:
        for name, tensor in _untie(opened.tensors).items():
            key = to_reference_name(name)
            heads = get_rotary_heads(name, config.text_config)
            ordered = to_pairs(tensor, heads) if heads else tensor
            tensors[PREFIX + key] = ordered.reshape(to_reference_shape(key, tensor.shape))
    except KeyError as error:
        raise UsageError(
            f"{opened.root}: the reference has no {error.args[0]}",
            "it cannot be written.",
            "keep the onellm format.",
        ) from None

    def finish(folder: Path) -> None:
        (folder / "params.json").write_text(json.dumps(params, indent=1) + "\n", encoding="utf-8")

    return OutputPlan((TensorFile("consolidated.00-of-01.pth", tuple(tensors.items())),), finish)


def _require_same_code(opened: OpenedCheckpoint, params: Mapping[str, Any]) -> None:
    """Check that the reference's code computes what the model does."""
    config: OneLLMConfig = opened.config
    if (
        config.upm.router != "soft"
        or config.vision.act != "quick_gelu"
        or params["n_kv_heads"] != params["n_heads"]
    ):
        raise UsageError(
            f"{opened.root}: router {config.upm.router}, activation {config.vision.act}, "
            f"{params['n_kv_heads']} of {params['n_heads']} key-value heads",
            "the reference's code runs only the soft router, QuickGELU and as many key-value heads "
            "as heads.",
            "use the onellm directory as it is.",
        )


def _untie(tensors: Tensors) -> Tensors:
    """Write tied embeddings twice: the reference has a head of its own."""
    head, embedding = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
    if head in tensors or embedding not in tensors:
        return tensors
    return {**tensors, head: tensors[embedding]}


def to_reference_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The reference's shape of a parameter.

    Queries [1, 30, D] and tags [1, 1, d] have batch dimensions there, and the point tokenizer is a
    1 x 1 convolution.

    Args:
        key: the reference's key, without `llma.`.
        shape: our shape.
    """
    if key.startswith("resample_tokens."):
        return (1, *shape)
    if key.startswith(("start_tag.", "end_tag.")):
        return (1, 1, shape[-1])
    return (shape[0], shape[1], 1, 1) if key == "conv1.point.conv1.weight" else shape
