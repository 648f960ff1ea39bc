"""Whether an LLM is exact: packed against alone, padded against alone, no look at later tokens.

Any causal LM of transformers can be put into a OneLLM, and many would be silently wrong: their
attention does not know where a sample of a pack ends, or a state runs on from one to the next. So a
small copy of the LLM's own config is tried before a model is built (`probe.py`), and the first
way to run it that gives what its own forward gives for each sample alone is used (`call.py`).
An LLM with no such way is refused.

Results are kept in the user's cache (`check_cache.py`); failures of the machine are not
(`faults.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.model.llm.call import LLMSupport
from onellm_dist.model.llm.check_cache import Result, get_cache_path, read_result, write_result
from onellm_dist.model.llm.faults import make_fault_error, raise_machine_fault
from onellm_dist.model.llm.positions import get_positions
from onellm_dist.model.llm.probe import (
    ProbeError,
    Reference,
    describe,
    find_support,
    own_context,
)
from onellm_dist.model.llm.probe_cached import find_cached
from onellm_dist.model.llm.reduction import find_depth, find_ratios, reduce_values

MOST_PARAMETERS = 400_000_000
"""Parameters of the largest copy that is tried (1.6 GB)."""


def check_llm(config: Any) -> LLMSupport:
    """How an LLM runs exactly.

    Args:
        config: config of the LLM, of any size; nothing of its full size is allocated.

    Raises:
        UsageError: transformers has no causal LM for the config, none of the ways to run it gives
            what it gives for each sample alone, or a library that it needs cannot be imported.
        MachineError: it could not be tried, for want of memory or because a disk failed.
    """
    kept = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if kept not in _CHECKED:
        try:
            _CHECKED[kept] = _check(config)
        except Exception as error:
            fault = make_fault_error(config.model_type, error)
            if fault is None:
                raise
            raise fault from error
    found, path = _CHECKED[kept]
    if isinstance(found, str):
        again = f" To check again, remove {path}, where this result is kept." if path else ""
        raise UsageError(
            f"the LLM {config.model_type} cannot be used: {found}",
            "packed samples would see each other or later tokens, and training and answers would "
            "be silently wrong.",
            f"choose an LLM of the table in docs/reference/llms.md.{again}",
        )
    if found.spare_positions is None:
        return found
    limit = (get_positions(config) or 0) + found.spare_positions
    if found.spare_positions < 0:
        # Rows up to the padding token's id hold no token (RoBERTa); in the copy it is 0.
        limit -= getattr(config, "pad_token_id", None) or 0
    return replace(found, position_limit=limit)


_CHECKED: dict[str, tuple[Result, Path | None]] = {}
"""Config as JSON -> (the result, the file where it is kept)."""


def _check(config: Any) -> tuple[Result, Path | None]:
    values = json.loads(json.dumps(config.to_dict(), default=str))
    try:
        path = get_cache_path(values, type(config).__name__)
    except RuntimeError:  # no home directory
        path = None
    if path is not None and (found := read_result(path)) is not None:
        return found, path
    with own_context():
        found = _try_copies(values, type(config))
    return found, path if path is not None and write_result(path, found) else None


def _try_copies(values: dict[str, Any], config_class: Any) -> Result:
    """Find a copy that runs, the smallest first, and how it runs exactly."""

    def build(reduced: dict[str, Any]) -> Any:
        return AutoModelForCausalLM.from_config(
            config_class.from_dict(reduced), trust_remote_code=False
        )

    why, fault = "transformers has no causal LM for it", None
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
                raise_machine_fault(error)
                if isinstance(error, ProbeError):
                    return describe(error)
                fault = fault or describe(error)  # of the smallest copy that could not be run
                continue
            found = find_support(reference)
            return found if isinstance(found, str) else find_cached(reference, found)
    return f"no small copy of it could be run ({fault or why})"


def _count_parameters(build: Callable[[dict[str, Any]], Any], reduced: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(reduced).parameters())
