"""Results of the check of LLMs, kept in the user's cache (`llm_check/` in it).

A result depends on the reduced config, on the code of the check and of packed attention, and on
every library whose code an LLM's forward may run: some families take another one where a package is
installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_torch_cuda_available

from onellm_dist.common.checksums import SEAL, is_intact, seal
from onellm_dist.common.files import write_atomic
from onellm_dist.common.resources import user_cache
from onellm_dist.common.source_texts import list_modules, read_source
from onellm_dist.model.llm.call import LLMSupport
from onellm_dist.model.llm.reduction import reduce_values

LIBRARIES = {
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "causal_conv1d": "causal-conv1d",
    "fla": "flash-linear-attention",
    "fla_core": "fla-core",
    "flash_attn": "flash-attn",
    "flash_attn_3": "flash-attn-3",
    "flash_attn_4": "flash-attn-4",
    "flash_attn_interface": "flash-attn-interface",
    "kernels": "kernels",
    "mamba_ssm": "mamba-ssm",
    "mambapy": "mambapy",
    "mlstm_kernels": "mlstm-kernels",
    "ninja": "ninja",
    "triton": "triton",
    "xlstm": "xlstm",
}
"""Modules that transformers' causal LMs may run (5.23), and the distributions that bring them."""

Result = LLMSupport | str
"""How an LLM runs exactly, or why it does not."""


def get_cache_path(values: dict[str, Any], class_name: str) -> Path:
    """Where the result for a config is kept; configs with the same small copy share it.

    Args:
        values: the config as JSON.
        class_name: name of its class.

    Raises:
        RuntimeError: the user has no home directory, and no cache is set.
    """
    identity = [
        _hash_sources(),
        class_name,
        reduce_values(values),
        torch.__version__,
        transformers.__version__,
        get_library_versions(),
        # Which of them transformers uses depends on these.
        is_torch_cuda_available(),
        os.environ.get("USE_HUB_KERNELS", ""),
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()
    return user_cache() / "llm_check" / f"{digest[:32]}.json"


def get_library_versions() -> dict[str, str]:
    """Module -> version of the libraries of LIBRARIES that are installed."""
    found: dict[str, str] = {}
    for module, distribution in LIBRARIES.items():
        try:
            found[module] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(module) is not None:  # on sys.path, but not installed
                found[module] = "unknown"
    return found


@cache
def _hash_sources() -> str:
    """Hash of the code that decides whether an LLM is exact."""
    model = __name__.rsplit(".", 2)[0]
    names = list_modules(model, ("attention", "sequence_lengths"))
    names += [*list_modules(f"{model}.llm"), *list_modules(f"{model}.kernels")]
    texts = [read_source(name) or "" for name in names]
    return hashlib.sha256("".join(texts).encode("utf-8")).hexdigest()


def read_result(path: Path) -> Result | None:
    """The kept result; None if there is none that is complete.

    Args:
        path: as of `get_cache_path`.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if SEAL not in kept or not is_intact(kept):
            return None
        result = kept["result"]
        return result if isinstance(result, str) else LLMSupport(**result)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_result(path: Path, result: Result) -> bool:
    """Keep a result, for this user alone. Without a place to write, the next process checks.

    Args:
        path: as of `get_cache_path`.
        result: what was found.

    Returns:
        Whether it was written.
    """
    content = seal({"result": result if isinstance(result, str) else asdict(result)})
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content))
        return True
    return False
