"""Tokenizers: find them beside weights, load them, copy them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
)

from onellm_dist.common.errors import UsageError
from onellm_dist.common.remote_code import make_remote_code_error

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        path: a directory, a `tokenizer.model` or `tokenizer.json` in one, or a GGUF file.

    Raises:
        UsageError: there is no tokenizer that transformers can read, or it needs code of its own.
    """
    folder = path if path.is_dir() else path.parent
    reason = "no such file"
    if path.exists():
        try:
            return _load(path, folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if (refusal := make_remote_code_error(folder, error)) is not None:
                raise refusal from None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UsageError(
        f"{path}: no tokenizer ({reason})",
        "the converted model could not read text.",
        "give LLaMA-2's tokenizer.model, or leave it out.",
    )


def _load(path: Path, folder: Path) -> PreTrainedTokenizerBase:
    if path.suffix == ".gguf":
        found: Any = AutoTokenizer.from_pretrained(
            folder, gguf_file=path.name, trust_remote_code=False
        )
    elif (folder / "tokenizer.model").is_file() and not (
        folder / "tokenizer_config.json"
    ).is_file():
        found = LlamaTokenizer.from_pretrained(folder)  # Meta's: the SentencePiece model alone
    else:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return cast(PreTrainedTokenizerBase, found)


def has_tokenizer(root: Path) -> bool:
    """Whether a folder or a GGUF file has a tokenizer."""
    if root.suffix == ".gguf":
        from gguf import GGUFReader

        return "tokenizer.ggml.model" in GGUFReader(root).fields
    return any(
        (root / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy a tokenizer as it is. Returns whether there was one.

    Args:
        source: a folder, a file in one, or a GGUF file.
        folder: where to copy it.
    """
    root = source if source.is_dir() or source.suffix == ".gguf" else source.parent
    if not has_tokenizer(root):
        return False
    if root.suffix == ".gguf":
        load_tokenizer(root).save_pretrained(folder)
        return True
    for name in TOKENIZER_FILES:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)
    return True
