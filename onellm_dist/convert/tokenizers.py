"""Tokenizer files: found beside weights, loaded, copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from onellm_dist.common.errors import UsageError

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory, or from the directory of a `tokenizer.model` or `tokenizer.json`; also a GGUF file's own.

    Raises:
        UsageError: there is none that transformers can read.
    """
    folder = path if path.is_dir() else path.parent
    reason = "no such file"
    if path.exists():
        try:
            if path.suffix == ".gguf":
                return AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
            if (folder / "tokenizer.model").is_file() and not (
                folder / "tokenizer_config.json"
            ).is_file():
                return LlamaTokenizer.from_pretrained(
                    folder
                )  # Meta's: nothing but the SentencePiece model
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UsageError(
        f"{path}: no tokenizer ({reason})",
        "the converted model could not read text.",
        "give LLaMA-2's tokenizer.model, or leave it out.",
    )


def has_tokenizer(root: Path) -> bool:
    """Whether a tokenizer stands in a folder (or in a GGUF file)."""
    if root.suffix == ".gguf":
        from gguf import GGUFReader

        return "tokenizer.ggml.model" in GGUFReader(root).fields
    return any(
        (root / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Put the tokenizer of `source` (a folder, a file in one, a GGUF file) into `folder`, as it is. Returns whether there was one."""
    root = source if source.is_dir() or source.suffix == ".gguf" else source.parent
    if not has_tokenizer(root):
        return False
    if root.suffix == ".gguf":
        load_tokenizer(root).save_pretrained(folder)
        return True
    for name in FILES:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)
    return True
