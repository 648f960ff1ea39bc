"""The reference's checkpoints (csuhan/OneLLM, keys `llma.*`) as a onellm directory."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from onellm_dist.errors import UsageError
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.encoder import name_from_open_clip
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.processing import OneLLMProcessor

ENCODER_HEAD_WIDTH, UPM_HEAD_WIDTH, LLM_HEAD_WIDTH = 64, 64, 128
"""Channels a head at the paper's size; a checkpoint does not say how many heads it has."""
REFERENCE_POSITIONS = 4096
"""Length of the reference's rotary table (twice its max_seq_len of 2048)."""

MODALITIES = {
    "image": "image", "video": "video", "audio": "audio", "point": "point",
    "rgbd": "depth", "rgbn": "normal", "fmri": "fmri", "imu": "imu",
}  # fmt: skip
"""The reference's name of each modality -> ours."""

# CLIP's text tower without its blocks: in every checkpoint, used by nothing.
_DEAD = re.compile(r"clip\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight|ln_final\.(weight|bias))")

_BLOCK = {
    "attention.wq": "attention.q", "attention.wk": "attention.k", "attention.wv": "attention.v", "attention.wo": "attention.out",
    "feed_forward.w1": "feed_forward.gate", "feed_forward.w3": "feed_forward.up", "feed_forward.w2": "feed_forward.down",
    "attention_norm": "attention_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
_LLM_BLOCK = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_LLM_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_TOKENIZER = {"audio": "conv", "point.conv1": "conv", "fmri": "linear", "imu": "conv"}

_Match = re.Match[str]
_MODAL = "|".join(MODALITIES)
_RULES: tuple[tuple[str, Callable[[_Match], str | None]], ...] = (
    (r"(tok_embeddings|norm|output)\.weight", lambda m: f"llm.{_LLM_TOP[m[1]]}.weight"),
    (rf"layers\.(\d+)\.({'|'.join(_LLM_BLOCK)})\.weight", lambda m: f"llm.model.layers.{m[1]}.{_LLM_BLOCK[m[2]]}.weight"),
    (rf"resample_layers\.(\d+)\.(\d+)\.({'|'.join(_BLOCK)})\.weight", lambda m: f"upm.experts.{m[1]}.blocks.{m[2]}.{_BLOCK[m[3]]}.weight"),
    (r"clip\.visual\.(.+)", lambda m: f"encoder.{name}" if (name := name_from_open_clip(m[1])) else None),
    (rf"conv1\.({'|'.join(_TOKENIZER)})\.(weight|bias)", lambda m: f"tokenizers.{m[1].split('.')[0]}.embed.{_TOKENIZER[m[1]]}.{m[2]}"),
    (r"positional_embedding\.(audio|point|fmri|imu)", lambda m: f"tokenizers.{m[1]}.positions.weight"),
    (rf"resample_tokens\.({_MODAL})", lambda m: f"projectors.{MODALITIES[m[1]]}.queries.weight"),
    (rf"(start|end)_tag\.({_MODAL})", lambda m: f"projectors.{MODALITIES[m[2]]}.{m[1]}_tag.weight"),
    (
        rf"clip_proj1\.({_MODAL})\.([01])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.in_proj.{('linear', 'norm')[int(m[2])]}.{m[3]}",
    ),
    (
        rf"clip_proj2\.({_MODAL})\.([01])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.out_proj.{('linear', 'norm')[int(m[2])]}.{m[3]}",
    ),
    (rf"routers\.({_MODAL})\.(fc[12])\.(weight|bias)", lambda m: f"projectors.{MODALITIES[m[1]]}.router.{m[2]}.{m[3]}"),
)


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        parameters: number of parameters written.
        ignored: keys that nothing uses (the rest of CLIP's text tower).
        tokenizer: whether the directory has one.
    """

    parameters: int
    ignored: tuple[str, ...]
    tokenizer: bool


def name_from_reference(key: str) -> str | None:
    """Our parameter for a key of the reference (without `llma.`), or None where it has none.

    The experts' names are the reference's `resample_layers.<expert>.<block>`; `rgbd` and `rgbn` are our depth and normal.
    """
    for pattern, rename in _RULES:
        match = re.fullmatch(pattern, key)
        if match:
            return rename(match)
    return None


def convert_reference(
    ckpt: Path,
    out: Path,
    *,
    encoder_heads: int | None = None,
    upm_heads: int | None = None,
    llm_heads: int | None = None,
    tokenizer: Path | None = None,
) -> Converted:
    """Write the checkpoint `ckpt` (.pth or .safetensors) as a onellm directory `out`, in its own precision (fp16 becomes fp32).

    Sizes are read from the shapes.

    Args:
        encoder_heads, upm_heads, llm_heads: attention heads; widths of 64, 64 and 128 a head where not given.
        tokenizer: LLaMA's `tokenizer.model`, or a directory with a transformers tokenizer; without one the directory holds
            the model alone.

    Raises:
        UsageError: no such file, not such a checkpoint, `out` is not empty, or keys that are unknown or missing (all are named).
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty", "its files would be overwritten.", "name a new directory.")
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    state = {key.removeprefix("llma."): tensor for key, tensor in read_checkpoint(ckpt).items()}
    config = config_from_shapes({k: tuple(v.shape) for k, v in state.items()}, ckpt, encoder_heads, upm_heads, llm_heads)
    with torch.device("meta"):
        model = OneLLMForConditionalGeneration(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    converted, ignored = _convert_state(state, wanted, config, ckpt)
    model.load_state_dict(converted, strict=True, assign=True)
    model.save_pretrained(out)
    if words is not None:
        OneLLMProcessor(words).save_pretrained(out)
    return Converted(sum(p.numel() for p in model.parameters()), ignored, words is not None)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file, memory-mapped (a training checkpoint's `model` entry where it has one).

    Raises:
        UsageError: there is no such file, or it is no checkpoint that can be read without running code.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint {path}", "there is nothing to convert.", "give consolidated.00-of-01.pth, or a .safetensors file.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise _unreadable(path, "it holds no mapping of names to tensors")
    return dict(loaded)


def _unreadable(path: Path, error: object) -> UsageError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(
        f"{path} cannot be read: {first}", "nothing was converted.", "download it again; only tensors are accepted, never pickled code."
    )


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], source: Path, encoder_heads: int | None, upm_heads: int | None, llm_heads: int | None
) -> OneLLMConfig:
    """The config that a checkpoint's shapes imply (keys without `llma.`); experts, blocks and layers are counted.

    Raises:
        UsageError: a key that a size is read from is missing.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in shapes:
            raise UsageError(
                f"{source}: no key llma.{key}", "the sizes are read from it.", "give a whole checkpoint of the reference's code."
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
        heads=encoder_heads or _heads(encoder_width, ENCODER_HEAD_WIDTH),
        mlp_ratio=shape("clip.visual.transformer.resblocks.0.mlp.c_fc.weight")[0] / encoder_width,
        patch_size=patch,
        image_size=patch * round((positions - 1) ** 0.5),
        output_dim=shape("clip.visual.proj")[1],
    )
    upm = OneLLMUPMConfig(
        experts=count(r"resample_layers\.(\d+)\."),
        blocks=count(r"resample_layers\.0\.(\d+)\."),
        heads=upm_heads or _heads(encoder_width, UPM_HEAD_WIDTH),
        ffn=shape("resample_layers.0.0.feed_forward.w1.weight")[0],
        router_hidden=shape("routers.image.fc1.weight")[0],
    )
    heads = llm_heads or _heads(width, LLM_HEAD_WIDTH)
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=shape("layers.0.feed_forward.w1.weight")[0],
        num_hidden_layers=count(r"layers\.(\d+)\."), num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=REFERENCE_POSITIONS, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    names = [ours for theirs, ours in MODALITIES.items() if f"resample_tokens.{theirs}" in shapes]
    return OneLLMConfig(vision=vision, upm=upm, text_config=text, modalities=names)


def _heads(width: int, head_width: int) -> int:
    return max(1, width // head_width)


def _convert_state(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, ...]], config: OneLLMConfig, source: Path
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Rename, reshape and permute; every key must have a place, and every place a key."""
    converted: dict[str, torch.Tensor] = {}
    ignored, problems = [], []
    for key, tensor in state.items():
        name = name_from_reference(key)
        if name is None or name not in wanted:
            if _DEAD.fullmatch(key) or key == "rope.freqs":
                ignored.append(f"llma.{key}")
            else:
                problems.append(f"unknown key llma.{key} {list(tensor.shape)}")
            continue
        value = _permute_rotary(name, tensor, config.text_config.num_attention_heads)
        if value.numel() != torch.Size(wanted[name]).numel():
            problems.append(f"llma.{key} has shape {list(tensor.shape)}, the model needs {list(wanted[name])}")
            continue
        value = value.reshape(wanted[name])
        converted[name] = (value.float() if value.dtype == torch.float16 else value).contiguous()
    problems += [f"nothing gives {name} {list(shape)}" for name, shape in wanted.items() if name not in converted]
    if problems:
        raise UsageError(
            f"{source}: {len(problems)} key{'s do' if len(problems) > 1 else ' does'} not fit\n" + "\n".join(f"  - {p}" for p in problems),
            "the model would be partly random.",
            "give a checkpoint of the reference's code (commit 8587a47 or later), and the right numbers of heads.",
        )
    return converted, tuple(sorted(ignored))


def _permute_rotary(name: str, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta rotates neighbouring channels (2i, 2i + 1), transformers channels (i, i + half): the rows of wq and wk move."""
    if not name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
        return weight
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory, or from the directory of a `tokenizer.model` or `tokenizer.json`.

    Raises:
        UsageError: there is none that transformers can read.
    """
    folder = path if path.is_dir() else path.parent
    if path.exists():
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
    else:
        reason = "no such file"
    raise UsageError(
        f"{path}: no tokenizer ({reason})", "the converted model could not read text.", "give LLaMA-2's tokenizer.model, or leave it out."
    )
