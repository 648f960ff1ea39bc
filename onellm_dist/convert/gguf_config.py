"""The config of a GGUF file's LLM, with everything that changes numbers, or a refusal.

transformers reads some of the keys and leaves the rest at the defaults of its configs. Here
each key of the architecture is known, or the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import UsageError

_KNOWN = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "use_parallel_residual",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
)
_WITHOUT_EFFECT = (0, 0.0, False, "none", "")
"""Values of other keys that switch nothing on."""
_COUNTS = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count")
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_POSITIONS = 8192


class GGUFKeys:
    """The keys of a file's architecture.

    Args:
        path: the file, for errors.
        values: all keys of the file.

    Raises:
        UsageError: a key is not known, or a number is missing.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.refuse("it does not name its architecture")
        self.architecture = architecture
        prefix = f"{architecture}."
        self.values = {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix)
        }
        self.tokenizer = {
            key.removeprefix("tokenizer.ggml."): value
            for key, value in values.items()
            if key.startswith("tokenizer.ggml.")
        }
        unknown = [
            f"{prefix}{key}={str(value)[:40]}"
            for key, value in self.values.items()
            if key not in _KNOWN and value not in _WITHOUT_EFFECT
        ]
        if unknown:
            raise self.refuse(f"this program does not know what {', '.join(unknown)} does")
        for key in _COUNTS:
            if type(self.values.get(key)) is not int or self.values[key] < 1:
                raise self.refuse(f"{prefix}{key} is {str(self.values.get(key))[:40]}")

    def refuse(self, reason: str) -> UsageError:
        """The error for a file that would become another model.

        Args:
            reason: what stands in the way.
        """
        return UsageError(
            f"{self.path}: {reason}",
            "the converted model would compute other numbers.",
            "use the model in transformers' format (hf).",
        )


def complete_config(keys: GGUFKeys, config: Any, factors: torch.Tensor | None) -> None:
    """Set what transformers leaves out when it reads a GGUF file.

    Args:
        keys: the file's keys.
        config: transformers' config, which is changed.
        factors: the tensor rope_freqs.weight, by which rotary frequencies are divided.

    Raises:
        UsageError: the file states something that the config cannot.
    """
    values = keys.values
    if not any(f"attention.layer_norm{rms}_epsilon" in values for rms in ("", "_rms")):
        raise keys.refuse("it states no epsilon of its norms")
    head = config.hidden_size // config.num_attention_heads
    width = values.get("attention.key_length", head)
    if values.get("attention.value_length", width) != width:
        raise keys.refuse("keys and values have heads of different widths")
    if width != head and not hasattr(config, "head_dim"):
        raise keys.refuse(f"heads of {width} channels at a width of {config.hidden_size}")
    if hasattr(config, "head_dim"):
        config.head_dim = width
    window = values.get("attention.sliding_window") or None
    if window and config.model_type in ("qwen2", "qwen3"):
        raise keys.refuse(f"attention.sliding_window={window}")
    if hasattr(config, "sliding_window"):
        config.sliding_window = window if keys.architecture != "llama" else None
    config.rope_parameters = _build_rope(keys, config, width, factors)
    if "partial_rotary_factor" in config.rope_parameters:
        config.partial_rotary_factor = config.rope_parameters["partial_rotary_factor"]


def _build_rope(
    keys: GGUFKeys, config: Any, width: int, factors: torch.Tensor | None
) -> dict[str, Any]:
    values = keys.values
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(values.get("rope.freq_base", 10000.0)),
    }
    rotated = values.get("rope.dimension_count", width)
    if rotated != width:
        if config.model_type not in ("stablelm", "phi3"):
            raise keys.refuse(f"{rotated} of {width} channels of a head turn with the position")
        rope["partial_rotary_factor"] = rotated / width
    kind = str(values.get("rope.scaling.type", "none"))
    factor = float(values.get("rope.scaling.factor") or values.get("rope.scale_linear") or 1.0)
    if kind == "linear" or (kind == "none" and "rope.scale_linear" in values):
        if factor != 1.0:
            rope |= {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise keys.refuse(f"its rotary positions are scaled by {kind}, which is not read from GGUF")
    if factors is not None:
        found = find_llama3_scaling(factors, rope["rope_theta"])
        if found is None or rope["rope_type"] != "default":
            raise keys.refuse(
                "its rotary frequencies (rope_freqs) are scaled in a way that is not LLaMA 3.1's"
            )
        rope |= found
    return rope


def find_llama3_scaling(factors: torch.Tensor, theta: float) -> dict[str, Any] | None:
    """LLaMA 3's scaling, by what it divides each rotary frequency by.

    Args:
        factors: what they are divided by, [head width / 2].
        theta: RoPE's base.

    Returns:
        The `rope_parameters`, empty if nothing is scaled; None if it is another scaling.
    """
    stored = factors.reshape(-1).double()
    if torch.equal(stored, torch.ones_like(stored)):
        return {}
    factor = round(float(stored.max()), 3)
    count = len(stored)
    waves = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = ((_LLAMA3_POSITIONS / waves - low) / (high - low)).clamp(0, 1)
    own = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(stored, own, rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        **_LLAMA3,
        "original_max_position_embeddings": _LLAMA3_POSITIONS,
    }


def get_generation(keys: GGUFKeys) -> dict[str, Any] | None:
    """The generation settings of a file with several tokens that end an answer; else None."""
    ends = {keys.tokenizer[key] for key in _ENDS if isinstance(keys.tokenizer.get(key), int)}
    if len(ends) < 2:
        return None
    first = keys.tokenizer.get("bos_token_id")
    start = {"bos_token_id": first} if isinstance(first, int) else {}
    return {**start, "eos_token_id": sorted(ends)}
