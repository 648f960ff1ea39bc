"""What a folder is that no format reads, or that one reads wrongly: words for people."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.file_kinds import FileKind

_MERGE = (
    "merge it into its base: PeftModel.from_pretrained(base, FOLDER).merge_and_unload()"
    ".save_pretrained(OUT), with the package peft."
)
_DEQUANTISE = (
    "use the weights that it was made from, in bf16 or fp16; or dequantise it with the library "
    "that made it."
)
_SAFETENSORS = "download the safetensors of the same model."

MOST_MODULES = 1024
"""Layers and heads of the largest models are some hundreds; to build a thousand takes seconds."""
MOST_EXPERTS = 1 << 17
"""Doge has 16,384 experts of one vector each."""
LARGEST_SIZE = 1 << 40
"""Any other number of a config."""

_MODULES = re.compile(
    r"((num|n)_)?((hidden|decoder|encoder|attention|key_value|kv)_)*(layers?|blocks|heads?)|depth"
)
_EXPERTS = re.compile(r"(moe_)?((num|n)_)?((local|routed|shared)_)?experts")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def identify_folder(folder: Path) -> FileKind | None:
    """What a folder is, if conversion has no use for it as it is; None: nothing is known of it."""
    if not folder.is_dir():
        return None
    for find in (_find_adapter, _find_other_model, _find_other_weights):
        kind = find(folder)
        if kind is not None:
            return kind
    return None


def refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    """Refuse weights that are not numbers of their own, but codes of a quantisation.

    Raises:
        UsageError: the config names a quantisation.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    raise UsageError(
        f"{folder}: the weights are quantised ({method or 'by an unnamed method'})",
        "their bytes are codes, which mean nothing without that library's scales and layout.",
        _DEQUANTISE,
    )


def refuse_impossible_sizes(folder: Path, config: Any) -> None:
    """Refuse a config whose model could not even be built without its weights.

    Raises:
        UsageError: it has more layers, experts or heads than any model.
    """
    waiting = [config]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += found
        if not isinstance(found, dict):
            continue
        waiting += found.values()
        for key, value in found.items():
            if type(value) in (int, float) and not abs(value) <= _get_largest(key):
                raise UsageError(
                    f"{folder}/config.json: {key}={str(value)[:40]}",
                    "no model is that large: the file is damaged.",
                    "download it again.",
                )


def _get_largest(key: str) -> int:
    if _MODULES.fullmatch(key):
        return MOST_MODULES
    return MOST_EXPERTS if _EXPERTS.fullmatch(key) else LARGEST_SIZE


def _find_adapter(folder: Path) -> FileKind | None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    found = read_json(path) or {}
    kind, base = found.get("peft_type") or "PEFT", found.get("base_model_name_or_path")
    return FileKind(
        f"an adapter ({kind}) over {base or 'an unnamed model'}, without the model", _MERGE
    )


def _find_other_model(folder: Path) -> FileKind | None:
    if (folder / "model_index.json").is_file():
        return FileKind("a pipeline of diffusers", "give the folder of one of its models.")
    config = read_json(folder / "config.json")
    if config is None:
        return None
    listed = config.get("architectures")
    names = ", ".join(map(str, listed if isinstance(listed, list) else [])) or str(
        config.get("model_type")
    )
    if config.get("is_encoder_decoder"):
        return FileKind(f"an encoder-decoder ({names})", "OneLLM needs a causal LM.")
    has_towers = any(f"{part}_config" in config for part in ("vision", "audio", "speech"))
    if has_towers and config.get("model_type") not in ("clip", "onellm"):
        return FileKind(
            f"a model with parts of its own for pictures or sound ({names})",
            "save its LLM alone: AutoModelForImageTextToText.from_pretrained(FOLDER)"
            ".language_model, in an AutoModelForCausalLM.",
        )
    if any(word in names for word in ("MaskedLM", "Classification", "RewardModel", "QuestionAns")):
        return FileKind(f"not a causal LM ({names})", "give a model with a language-model head.")
    return None


def _find_other_weights(folder: Path) -> FileKind | None:
    has: Callable[[str], bool] = lambda pattern: any(folder.glob(pattern))  # noqa: E731
    if has("*.safetensors*") or has("*.bin*") or has("*.pt") or has("*.pth"):
        return None
    for pattern, what, do in (
        ("*.gguf", "a folder of GGUF files", "give the file: `onellm convert gguf FILE.gguf`."),
        ("*.h5", "a folder of TensorFlow weights", _SAFETENSORS),
        ("*.msgpack", "a folder of Flax weights", _SAFETENSORS),
        ("*.onnx", "a folder of ONNX graphs", _SAFETENSORS),
        ("openvino_model.xml", "a folder of OpenVINO graphs", _SAFETENSORS),
        ("checkpoint-*", "a folder of Trainer's checkpoints", "give one of its checkpoint-N."),
        ("snapshots/*", "a folder of the Hub's cache", "give the folder below snapshots/."),
        ("tokenizer*", "a folder with a tokenizer, without weights", "download the weights too."),
        ("config.json", "a folder without weights", "download the weights too."),
    ):
        if has(pattern):
            return FileKind(what, do)
    return None
