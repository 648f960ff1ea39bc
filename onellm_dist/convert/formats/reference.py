"""The reference's checkpoints (csuhan/OneLLM at 8587a47, keys `llma.*`), whole or in model-parallel files, in and out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Plan, Tensors, fitted, parameter_shapes
from onellm_dist.convert.names.clip import only_clip, open_clip_name
from onellm_dist.convert.names.llama import (
    BLOCK,
    ROTARY_TABLE,
    TOP,
    check_heads,
    params_from_config,
    rotary_heads,
    to_halves,
    to_pairs,
)
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.convert.tensors.parallel_files import merged, numbered_files
from onellm_dist.convert.tensors.writers import TensorFile
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.towers import from_open_clip_name

NAME, KIND = "reference", "onellm"
PREFIX = "llma."
ENCODER_HEAD_WIDTH, UPM_HEAD_WIDTH, LLM_HEAD_WIDTH = 64, 64, 128
"""Channels a head at the paper's size; a checkpoint does not say how many heads it has."""
REFERENCE_POSITIONS = 4096
"""Length of the reference's rotary table (twice its max_seq_len of 2048)."""

MODALITIES = {
    "image": "image",
    "video": "video",
    "audio": "audio",
    "point": "point",
    "rgbd": "depth",
    "rgbn": "normal",
    "fmri": "fmri",
    "imu": "imu",
}
"""The reference's name of each modality -> ours."""

# CLIP's text tower without its blocks: in every checkpoint, used by nothing.
_DEAD = re.compile(
    r"clip\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight|ln_final\.(weight|bias))"
)

_UPM_BLOCK = {
    "attention.wq": "attention.q",
    "attention.wk": "attention.k",
    "attention.wv": "attention.v",
    "attention.wo": "attention.out",
    "feed_forward.w1": "feed_forward.gate",
    "feed_forward.w3": "feed_forward.up",
    "feed_forward.w2": "feed_forward.down",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_TOKENIZER = {"audio": "conv", "point.conv1": "conv", "fmri": "linear", "imu": "conv"}
_PROJECTION = ("linear", "norm")

_Match = re.Match[str]
_MODAL = "|".join(MODALITIES)
_RULES: tuple[tuple[str, Callable[[_Match], str | None]], ...] = (
    (r"(tok_embeddings|norm|output)\.weight", lambda m: f"llm.{TOP[m[1]]}.weight"),
    (
        rf"layers\.(\d+)\.({'|'.join(BLOCK)})\.weight",
        lambda m: f"llm.model.layers.{m[1]}.{BLOCK[m[2]]}.weight",
    ),
    (
        rf"resample_layers\.(\d+)\.(\d+)\.({'|'.join(_UPM_BLOCK)})\.weight",
        lambda m: f"upm.experts.{m[1]}.blocks.{m[2]}.{_UPM_BLOCK[m[3]]}.weight",
    ),
    (
        r"clip\.visual\.(.+)",
        lambda m: f"encoder.{name}" if (name := from_open_clip_name(m[1])) else None,
    ),
    (
        rf"conv1\.({'|'.join(_TOKENIZER)})\.(weight|bias)",
        lambda m: f"tokenizers.{m[1].split('.')[0]}.embed.{_TOKENIZER[m[1]]}.{m[2]}",
    ),
    (
        r"positional_embedding\.(audio|point|fmri|imu)",
        lambda m: f"tokenizers.{m[1]}.positions.weight",
    ),
    (rf"resample_tokens\.({_MODAL})", lambda m: f"projectors.{MODALITIES[m[1]]}.queries.weight"),
    (rf"(start|end)_tag\.({_MODAL})", lambda m: f"projectors.{MODALITIES[m[2]]}.{m[1]}_tag.weight"),
    (
        rf"clip_proj1\.({_MODAL})\.([01])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.in_proj.{_PROJECTION[int(m[2])]}.{m[3]}",
    ),
    (
        rf"clip_proj2\.({_MODAL})\.([01])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.out_proj.{_PROJECTION[int(m[2])]}.{m[3]}",
    ),
    (
        rf"routers\.({_MODAL})\.(fc[12])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.router.{m[2]}.{m[3]}",
    ),
)


def name_from_reference(key: str) -> str | None:
    """Our parameter for a key of the reference (without `llma.`), or None where it has none.

    The experts' names are the reference's `resample_layers.<expert>.<block>`; `rgbd` and `rgbn` are our depth and normal.
    """
    for pattern, rename in _RULES:
        match = re.fullmatch(pattern, key)
        if match:
            return rename(match)
    return None


_THEIRS = {ours: theirs for theirs, ours in MODALITIES.items()}
_BACK: tuple[tuple[str, Callable[[_Match], str | None]], ...] = (
    (
        r"llm\.(model\.embed_tokens|model\.norm|lm_head)\.weight",
        lambda m: f"{_inverse(TOP)[m[1]]}.weight",
    ),
    (
        r"llm\.model\.layers\.(\d+)\.(.+)\.weight",
        lambda m: f"layers.{m[1]}.{_inverse(BLOCK)[m[2]]}.weight",
    ),
    (
        r"upm\.experts\.(\d+)\.blocks\.(\d+)\.(.+)\.weight",
        lambda m: f"resample_layers.{m[1]}.{m[2]}.{_inverse(_UPM_BLOCK)[m[3]]}.weight",
    ),
    (r"encoder\.(.+)", lambda m: f"clip.visual.{open_clip_name(m[1])}"),
    (
        r"tokenizers\.(\w+)\.embed\.\w+\.(weight|bias)",
        lambda m: f"conv1.{'point.conv1' if m[1] == 'point' else m[1]}.{m[2]}",
    ),
    (r"tokenizers\.(\w+)\.positions\.weight", lambda m: f"positional_embedding.{m[1]}"),
    (r"projectors\.(\w+)\.queries\.weight", lambda m: f"resample_tokens.{_THEIRS[m[1]]}"),
    (r"projectors\.(\w+)\.(start|end)_tag\.weight", lambda m: f"{m[2]}_tag.{_THEIRS[m[1]]}"),
    (
        r"projectors\.(\w+)\.(in|out)_proj\.(linear|norm)\.(weight|bias)",
        lambda m: (
            f"clip_proj{1 if m[2] == 'in' else 2}.{_THEIRS[m[1]]}.{_PROJECTION.index(m[3])}.{m[4]}"
        ),
    ),
    (
        r"projectors\.(\w+)\.router\.(fc[12])\.(weight|bias)",
        lambda m: f"routers.{_THEIRS[m[1]]}.{m[2]}.{m[3]}",
    ),
)


def name_to_reference(name: str) -> str:
    """The reference's key (without `llma.`) of our parameter.

    Raises:
        KeyError: the reference has no such part.
    """
    for pattern, rename in _BACK:
        match = re.fullmatch(pattern, name)
        if match and (key := rename(match)):
            return key
    raise KeyError(name)


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


# -- in -------------------------------------------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Whether `path` looks like one: a consolidated file or a folder of them, with the reference's keys."""
    try:
        files = numbered_files(path)
        return any(key.startswith(f"{PREFIX}resample_") for key in merged(files[:1], width_of=None))
    except (UsageError, OSError):
        return False


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open `consolidated.00-of-01.pth` (or all of `-of-NN`: name the folder or the first), or safetensors of the same keys.

    Sizes are read from the shapes; heads from `params.json` beside it where there is one, else from the usual widths a head.

    Raises:
        UsageError: not such a checkpoint, or heads that cannot be.
    """
    files = numbered_files(path)
    state = {
        key.removeprefix(PREFIX): t
        for key, t in merged(files, width_of=f"{PREFIX}layers.0.attention.wq.weight").items()
    }
    params = _params_beside(files[0])
    config = config_from_shapes(
        {k: t.shape for k, t in state.items()},
        files[0],
        options.encoder_heads,
        options.upm_heads,
        options.llm_heads or params.get("n_heads"),
    )
    table = next((t for k, t in state.items() if ROTARY_TABLE.fullmatch(k)), None)
    check_heads(
        "--llm-heads", config.text_config.num_attention_heads, config.text_config.hidden_size, table
    )
    wanted = parameter_shapes(lambda: OneLLMForConditionalGeneration(config))
    given = {f"{PREFIX}{k}": (name_from_reference(k), t) for k, t in state.items()}
    tensors, ignored, problems = fitted(given, wanted, ignore=_unused)
    for name in tensors:
        heads = rotary_heads(name, config.text_config)
        if heads:
            tensors[name] = to_halves(tensors[name], heads)
    notes = {"model-parallel files": len(files)} if len(files) > 1 else {}
    return Opened(NAME, KIND, config, tensors, files, files[0].parent, ignored, problems, notes)


def _unused(key: str) -> bool:
    bare = key.removeprefix(PREFIX)
    return bool(_DEAD.fullmatch(bare) or ROTARY_TABLE.fullmatch(bare))


def _params_beside(file: Path) -> dict[str, Any]:
    path = file.with_name("params.json")
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}", "the number of heads is in it.", "mend or remove it."
        ) from None


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    source: Path,
    encoder_heads: int | None,
    upm_heads: int | None,
    llm_heads: int | None,
) -> OneLLMConfig:
    """The config that a checkpoint's shapes imply (keys without `llma.`); experts, blocks and layers are counted.

    Raises:
        UsageError: a key that a size is read from is missing, or heads do not split a width.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in shapes:
            raise UsageError(
                f"{source}: no key {PREFIX}{key}",
                "the sizes are read from it.",
                "give a whole checkpoint of the reference's code.",
            )
        return shapes[key]

    def count(pattern: str) -> int:
        return len({m[1] for key in shapes if (m := re.match(pattern, key))})

    vocabulary, width = shape("tok_embeddings.weight")
    encoder_width, _, patch, _ = shape("clip.visual.conv1.weight")
    positions = shape("clip.visual.positional_embedding")[0]
    vision = OneLLMVisionConfig(
        width=encoder_width,
        layers=count(r"clip\.visual\.transformer\.resblocks\.(\d+)\."),
        heads=_heads("--encoder-heads", encoder_heads, encoder_width, ENCODER_HEAD_WIDTH),
        mlp_ratio=shape("clip.visual.transformer.resblocks.0.mlp.c_fc.weight")[0] / encoder_width,
        patch_size=patch,
        image_size=patch * round((positions - 1) ** 0.5),
        output_dim=shape("clip.visual.proj")[1],
    )
    upm = OneLLMUPMConfig(
        experts=count(r"resample_layers\.(\d+)\."),
        blocks=count(r"resample_layers\.0\.(\d+)\."),
        heads=_heads("--upm-heads", upm_heads, encoder_width, UPM_HEAD_WIDTH),
        ffn=shape("resample_layers.0.0.feed_forward.w1.weight")[0],
        router_hidden=shape("routers.image.fc1.weight")[0],
    )
    heads = _heads("--llm-heads", llm_heads, width, LLM_HEAD_WIDTH)
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shape("layers.0.feed_forward.w1.weight")[0],
        num_hidden_layers=count(r"layers\.(\d+)\."),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=REFERENCE_POSITIONS,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    names = [ours for theirs, ours in MODALITIES.items() if f"resample_tokens.{theirs}" in shapes]
    return OneLLMConfig(vision=vision, upm=upm, text_config=text, modalities=names)


def _heads(label: str, given: int | None, width: int, head_width: int) -> int:
    heads = max(1, width // head_width) if given is None else given
    check_heads(label, heads, width)
    return heads


# -- out ------------------------------------------------------------------------------------------------------------------


def plan(opened: Opened, options: Options) -> Plan:
    """`consolidated.00-of-01.pth` for the reference's code (and its `params.json`).

    Raises:
        UsageError: the model has a part that the reference does not know.
    """
    config: OneLLMConfig = opened.config
    only_clip(config.vision, NAME)
    params = params_from_config(config.text_config)
    if (
        config.upm.router != "soft"
        or config.vision.act != "quick_gelu"
        or params["n_kv_heads"] != params["n_heads"]
    ):
        raise UsageError(
            f"{opened.root}: router {config.upm.router}, activation {config.vision.act}, "
            f"{params['n_kv_heads']} of {params['n_heads']} key-value heads",
            "the reference's code runs the soft router, QuickGELU and as many key-value heads as heads only.",
            "use the onellm directory as it is.",
        )
    tensors: dict[str, LazyTensor] = {}
    try:
        for name, tensor in _untied(opened.tensors).items():
            key = name_to_reference(name)
            heads = rotary_heads(name, config.text_config)
            tensors[PREFIX + key] = (to_pairs(tensor, heads) if heads else tensor).reshaped(
                _their_shape(key, tensor.shape)
            )
    except KeyError as error:
        raise UsageError(
            f"{opened.root}: the reference has no {error.args[0]}",
            "it cannot be written.",
            "keep the onellm form.",
        ) from None

    def finish(folder: Path) -> None:
        (folder / "params.json").write_text(json.dumps(params, indent=1) + "\n", encoding="utf-8")

    return Plan((TensorFile("consolidated.00-of-01.pth", tuple(tensors.items())),), finish)


def _untied(tensors: Tensors) -> Tensors:
    """Tied embeddings are written twice: the reference has a head of its own."""
    head, embedding = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
    return (
        tensors
        if head in tensors or embedding not in tensors
        else {**tensors, head: tensors[embedding]}
    )


def _their_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Queries [1, 30, D] and tags [1, 1, d] have batch dimensions there, and the point tokenizer is a 1 x 1 convolution."""
    if key.startswith("resample_tokens."):
        return (1, *shape)
    if key.startswith(("start_tag.", "end_tag.")):
        return (1, 1, shape[-1])
    return (shape[0], shape[1], 1, 1) if key == "conv1.point.conv1.weight" else shape


# -- the whole conversion as one function ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """What `convert_reference` did.

    Attributes:
        parameters: number of parameters written.
        ignored: keys that nothing uses (the rest of CLIP's text tower).
        tokenizer: whether the directory has one.
    """

    parameters: int
    ignored: tuple[str, ...]
    tokenizer: bool


def convert_reference(
    ckpt: Path,
    out: Path,
    *,
    encoder_heads: int | None = None,
    upm_heads: int | None = None,
    llm_heads: int | None = None,
    tokenizer: Path | None = None,
) -> Converted:
    """Write the checkpoint `ckpt` as a onellm directory `out`: `onellm convert reference` as a function.

    Raises:
        UsageError: no such file, not such a checkpoint, `out` is not empty, or keys that are unknown or missing (all are named).
    """
    from onellm_dist.convert.conversion import convert

    options = Options(
        tokenizer=tokenizer, encoder_heads=encoder_heads, upm_heads=upm_heads, llm_heads=llm_heads
    )
    opened, _ = convert(NAME, ckpt, out, to="onellm", options=options, quiet=True)
    return Converted(
        sum(t.numel for t in opened.tensors.values()),
        opened.ignored,
        (out / "tokenizer.json").is_file(),
    )
