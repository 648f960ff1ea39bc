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
    build_on_meta,
    drop_tied_copies,
    fit_tensors,
)
from onellm_dist.convert.names.clip import require_clip
from onellm_dist.convert.names.llama import (
    ROTARY_TABLE,
    check_heads,
    get_rotary_heads,
    to_halves,
    to_pairs,
)
from onellm_dist.convert.names.llama_params import (
    build_llama_config,
    build_params,
    check_rotary_table,
    read_params,
)
from onellm_dist.convert.names.model_parallel import find_numbered_files, merge_files
from onellm_dist.convert.names.reference import (
    MODALITIES,
    from_reference_name,
    to_reference_name,
)
from onellm_dist.convert.sidecar import (
    SIDECAR,
    choose_heads,
    read_sidecar,
    refuse_contradictions,
    write_sidecar,
)
from onellm_dist.convert.tensors.lazy import Shapes, Tensors
from onellm_dist.convert.tensors.writers import TensorFile
from onellm_dist.convert.tokenizers import copy_tokenizer
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
SPAN_ROWS = "span_positions."
"""Keys of our own: the reference, which gives a medium one span, has no such rows."""
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

    Sizes are read from the shapes. Heads and everything else come from the config that a
    conversion wrote beside the file, else from `params.json`, options, and the usual widths of a
    head.

    Args:
        path: the file, the first of several files, or their folder.
        options: the numbers of heads.

    Raises:
        UsageError: not such a checkpoint, or numbers of heads that are impossible or contradict
            each other.
    """
    files = find_numbered_files(path)
    merged = merge_files(files, width_of=f"{PREFIX}layers.0.attention.wq.weight")
    state = {key.removeprefix(PREFIX): tensor for key, tensor in merged.items()}
    root = files[0].parent
    stated, generation = read_sidecar(root, OneLLMConfig.model_type)
    params = read_params(root / "params.json")
    heads = _choose_heads(options, params, stated, root)
    if params is None and stated is not None:
        params = build_params(stated.text_config)
    shapes = {key: tensor.shape for key, tensor in state.items()}
    config = build_config_from_shapes(shapes, files[0], *heads, params=params)
    text = config.text_config
    table = next((t for key, t in state.items() if ROTARY_TABLE.fullmatch(key)), None)
    check_heads("--llm-heads", text.num_attention_heads, text.hidden_size, table)
    if table is not None:
        check_rotary_table(table, float((params or {}).get("rope_theta") or 10000.0), files[0])
    if stated is not None:
        refuse_contradictions(root, _list_facts(stated), _list_facts(config))
        config = stated
    model = build_on_meta(lambda: OneLLMForConditionalGeneration(config))
    given = {from_reference_name(key) or f"{PREFIX}{key}": t for key, t in state.items()}
    kept, copies, problems = drop_tied_copies(given, model)
    keys = {name: to_reference_key(name) for name in kept}
    tensors, ignored, more = fit_tensors(
        {keys[name]: (name, tensor) for name, tensor in kept.items()},
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        ignore=_is_unused,
    )
    for name in tensors:
        if heads_of := get_rotary_heads(name, config.text_config):
            tensors[name] = to_halves(tensors[name], heads_of)
    notes = {"model-parallel files": len(files)} if len(files) > 1 else {}
    return OpenedCheckpoint(
        NAME,
        KIND,
        config,
        tensors,
        files,
        root,
        (*copies, *ignored),
        (*problems, *more),
        notes,
        generation=generation,
    )


def to_reference_key(name: str) -> str:
    """The key that a checkpoint has for one of our names; a key that is not ours stays."""
    if name.startswith(PREFIX):
        return name
    return PREFIX + to_reference_name(name)


def _choose_heads(
    options: ConversionOptions, params: Mapping[str, Any] | None, stated: Any, root: Path
) -> tuple[int | None, int | None, int | None]:
    """Heads of encoder, UPM and LLM, by options, params.json and the config beside."""
    side = root / SIDECAR
    encoder = choose_heads(
        "--encoder-heads", options.encoder_heads, stated and stated.vision.heads, side
    )
    upm = choose_heads("--upm-heads", options.upm_heads, stated and stated.upm.heads, side)
    n_heads = (params or {}).get("n_heads")
    llm = choose_heads("--llm-heads", options.llm_heads, n_heads, root / "params.json")
    if params is None and stated is not None:
        llm = choose_heads("--llm-heads", llm, stated.text_config.num_attention_heads, side)
    return encoder, upm, llm


def _list_facts(config: OneLLMConfig) -> dict[str, Any]:
    """What shapes, params.json and options say for certain about a model."""
    vision, upm = config.vision, config.upm
    return {
        **build_params(config.text_config),
        "encoder width": vision.width,
        "encoder layers": vision.layers,
        "encoder heads": vision.heads,
        "encoder MLP width": vision.mlp_width,
        "patch size": vision.patch_size,
        "image size": vision.image_size,
        "output_dim": vision.output_dim,
        "activation": vision.act,
        "UPM experts": upm.experts,
        "UPM blocks": upm.blocks,
        "UPM heads": upm.heads,
        "UPM ffn": upm.ffn,
        "router width": upm.router_hidden,
        "router": upm.router,
        "modalities": config.modalities,
        "learned span positions": config.span_positions == "learned",
    }


def _is_unused(key: str) -> bool:
    bare = key.removeprefix(PREFIX)
    return bool(_UNUSED.fullmatch(bare) or ROTARY_TABLE.fullmatch(bare))


def build_config_from_shapes(
    shapes: Shapes,
    source: Path,
    encoder_heads: int | None,
    upm_heads: int | None,
    llm_heads: int | None,
    *,
    params: Mapping[str, Any] | None = None,
) -> OneLLMConfig:
    """The config that a checkpoint's shapes imply; experts, blocks and layers are counted.

    Args:
        shapes: key without `llma.` -> shape.
        source: the checkpoint, for the error.
        encoder_heads: heads of the encoder; default: of the usual width.
        upm_heads: heads of the UPM; default: of the usual width.
        llm_heads: heads of the LLM; default: of the usual width.
        params: content of params.json, if there is one.

    Raises:
        UsageError: a key that a size is read from is missing, or heads do not divide a width.
    """
    reader = _ShapeReader(shapes, source)
    text = _build_text_config(reader, shapes, llm_heads, params or {})
    vision = _build_vision_config(reader, encoder_heads)
    upm = OneLLMUPMConfig(
        experts=reader.count(r"resample_layers\.(\d+)\."),
        blocks=reader.count(r"resample_layers\.0\.(\d+)\."),
        heads=_get_heads("--upm-heads", upm_heads, vision.width, UPM_HEAD_WIDTH),
        ffn=reader.shape("resample_layers.0.0.feed_forward.w1.weight")[0],
        router_hidden=reader.shape("routers.image.fc1.weight")[0],
    )
    names = [ours for theirs, ours in MODALITIES.items() if f"resample_tokens.{theirs}" in shapes]
    learned = any(key.startswith(SPAN_ROWS) for key in shapes)
    return OneLLMConfig(
        vision=vision,
        upm=upm,
        text_config=text,
        modalities=names,
        span_positions="learned" if learned else "none",
    )


class _ShapeReader:
    """Reads sizes from the shapes of a checkpoint."""

    def __init__(self, shapes: Shapes, source: Path) -> None:
        self._shapes = shapes
        self.source = source

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a key that must be there, with as many dimensions as the parameter has."""
        dimensions = 4 if key.endswith("visual.conv1.weight") else 2
        if len(self._shapes.get(key, ())) != dimensions:
            raise UsageError(
                f"{self.source}: no key {PREFIX}{key}",
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


def _build_text_config(
    reader: _ShapeReader, shapes: Shapes, heads: int | None, params: Mapping[str, Any]
) -> LlamaConfig:
    width = reader.shape("tok_embeddings.weight")[1]
    for key in ("attention.wq", "attention.wk", "feed_forward.w1"):
        reader.shape(f"layers.0.{key}.weight")
    given = {
        "max_seq_len": REFERENCE_POSITIONS,
        **params,
        "n_heads": _get_heads("--llm-heads", heads, width, LLM_HEAD_WIDTH),
    }
    return build_llama_config(given, shapes, reader.source)


def _get_heads(label: str, given: int | None, width: int, head_width: int) -> int:
    heads = max(1, width // head_width) if given is None else given
    check_heads(label, heads, width)
    return heads


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """`consolidated.00-of-01.pth` and `params.json` for the reference's code.

    Beside them are what these have no place for (sidecar.py), and the tokenizer if there is one.

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
        write_sidecar(folder, opened)
        copy_tokenizer(options.tokenizer or opened.root, folder)

    return OutputPlan((TensorFile("consolidated.00-of-01.pth", tuple(tensors.items())),), finish)


def _require_same_code(opened: OpenedCheckpoint, params: Mapping[str, Any]) -> None:
    """Check that the reference's code computes what the model does."""
    config: OneLLMConfig = opened.config
    faults = [
        fault
        for fault, there in (
            (f"a {config.upm.router} router", config.upm.router != "soft"),
            (f"activation {config.vision.act}", config.vision.act != "quick_gelu"),
            (
                f"{params['n_kv_heads']} key-value heads of {params['n_heads']}",
                params["n_kv_heads"] != params["n_heads"],
            ),
            (f"rope_theta {params.get('rope_theta')}", "rope_theta" in params),
            ("scaled rotary positions", "use_scaled_rope" in params),
            ("pixels normalised in another way than CLIP's", _has_own_pixels(config)),
        )
        if there
    ]
    if faults:
        raise UsageError(
            f"{opened.root}: it has {', '.join(faults)}",
            "the reference's code runs only the soft router, QuickGELU, as many key-value heads as "
            "heads, RoPE of base 10000 without scaling, and CLIP's pixels.",
            "use the onellm directory as it is.",
        )


def _has_own_pixels(config: OneLLMConfig) -> bool:
    vision = config.vision
    return vision.image_mean is not None or vision.image_std is not None


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
