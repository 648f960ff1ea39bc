"""Whether an LLM is exact: packed against alone, padded against alone, no look at later tokens.

Any causal LM of transformers can be put into a OneLLM, and many would be silently wrong: their
attention does not know where a sample of a pack ends, or a state runs on from one to the next. So a
small copy of the LLM's own config is tried before a model is built (`llm_probe.py`), and the first
way to run it that gives what its own forward gives for each sample alone is used (`llm_call.py`).
An LLM with no such way is refused.

The result depends on the reduced config, on the versions of torch and transformers, and on the code
of the check and of packed attention. It is kept in the user's cache (`llm_check/` in it, see
`common/resources.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.resources import user_cache
from onellm_dist.model.llm_call import LLMSupport
from onellm_dist.model.llm_probe import (
    ProbeError,
    Reference,
    describe,
    find_support,
    own_context,
)
from onellm_dist.model.llm_reduction import (
    find_depth,
    find_ratios,
    get_positions,
    reduce_values,
)

MOST_PARAMETERS = 400_000_000
"""Parameters of the largest copy that is tried (1.6 GB)."""


def check_llm(config: Any) -> LLMSupport:
    """How an LLM runs exactly.

    Args:
        config: config of the LLM, of any size; nothing of its full size is allocated.

    Raises:
        UsageError: transformers has no causal LM for the config, or none of the ways to run it
            gives what it gives for each sample alone.
    """
    kept = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if kept not in _CHECKED:
        _CHECKED[kept] = _check(config)
    found = _CHECKED[kept]
    if isinstance(found, str):
        raise UsageError(
            f"the LLM {config.model_type} cannot be used: {found}",
            "packed samples would see each other or later tokens, and training and answers would "
            "be silently wrong.",
            "choose an LLM of the table in docs/reference/llms.md.",
        )
    limit = get_positions(config) if found.position_limit is not None else None
    return replace(found, position_limit=limit)


_CHECKED: dict[str, LLMSupport | str] = {}
"""Config as JSON -> how it runs exactly, or why it does not."""


def _check(config: Any) -> LLMSupport | str:
    values = json.loads(json.dumps(config.to_dict(), default=str))
    path = _get_cache_path(values, type(config).__name__)
    if (found := _read(path)) is not None:
        return found
    with own_context():
        found = _try_copies(values, type(config))
    _write(path, found)
    return found


def _try_copies(values: dict[str, Any], config_class: Any) -> LLMSupport | str:
    """Find a copy that runs, the smallest first, and how it runs exactly."""

    def build(reduced: dict[str, Any]) -> Any:
        return AutoModelForCausalLM.from_config(config_class.from_dict(reduced))

    why = "transformers has no causal LM for it"
    for width in range(len(find_ratios(values))):
        for full_depth in (False, True):
            try:
                reduced = reduce_values(values, width=width)
                depth = None if full_depth else find_depth(reduced, build)
                if depth is not None:
                    reduced = reduce_values(values, width=width, depth=depth)
                if (size := _count_parameters(build, reduced)) > MOST_PARAMETERS:
                    why = f"the copy has {size / 1e6:.0f} million parameters"
                    continue
                reference = Reference(config_class.from_dict(reduced))
            except Exception as error:  # whatever transformers' code raises
                why = describe(error)
                if isinstance(error, ProbeError):
                    return why
                continue
            return find_support(reference)
    return f"no small copy of it could be run ({why})"


def _count_parameters(build: Callable[[dict[str, Any]], Any], reduced: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(reduced).parameters())


def _get_cache_path(values: dict[str, Any], class_name: str) -> Path:
    """Where the result for a config is kept; configs with the same small copy share it."""
    identity = [
        _hash_sources(),
        class_name,
        reduce_values(values),
        torch.__version__,
        transformers.__version__,
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()
    return user_cache() / "llm_check" / f"{digest[:32]}.json"


@cache
def _hash_sources() -> str:
    """Hash of the code that decides whether an LLM is exact."""
    folder = Path(__file__).parent
    names = ["attention.py", "sequence_lengths.py", "llm_*.py", "kernels/*.py"]
    files = sorted(file for name in names for file in folder.glob(name))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read(path: Path) -> LLMSupport | str | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if isinstance(kept, str) else LLMSupport(**kept)
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, found: LLMSupport | str) -> None:
    """Keep a result, for this user alone. Without a place to write, the next process checks."""
    with suppress(OSError, RuntimeError):  # RuntimeError: no home directory
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, json.dumps(found if isinstance(found, str) else asdict(found)))
