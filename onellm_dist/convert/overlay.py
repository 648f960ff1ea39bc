"""Weights of another program's training checkpoint over the model that was trained (`--base`): config and frozen weights are its."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Problem, Tensors
from onellm_dist.convert.registry import format_of, recognised

PREFIXES = ("module.", "model.", "state_dict.", "app.")
"""What wrappers put before every name."""


def overlaid(
    format_name: str,
    root: Path,
    given: Tensors,
    files: tuple[Path, ...],
    options: Options,
    notes: Mapping[str, Any],
) -> Opened:
    """The base with `given` in place of its own tensors, in the dtypes that `given` has.

    Raises:
        UsageError: there is no base, or its names are not those of the checkpoint.
    """
    if options.base is None:
        raise UsageError(
            f"{root} holds weights and no config",
            "the architecture and frozen weights come from the model it started from.",
            "give --base DIR.",
        )
    base: Opened = format_of(recognised(options.base)).open_checkpoint(options.base, options)
    given = _bare(given, base.tensors)
    wrong = [
        Problem("unexpected", n, str(list(t.shape)))
        for n, t in given.items()
        if n not in base.tensors
    ]
    wrong += [
        Problem(
            "mismatched", n, f"has shape {list(t.shape)}, the base {list(base.tensors[n].shape)}"
        )
        for n, t in given.items()
        if n in base.tensors and base.tensors[n].shape != t.shape
    ]
    spoilt = {problem.name for problem in wrong}
    tensors = {**base.tensors, **{n: t for n, t in given.items() if n not in spoilt}}
    trained = {**notes, "tensors over the base": f"{len(given)} of {len(tensors)}"}
    return Opened(
        format_name,
        base.kind,
        base.config,
        tensors,
        (*files, *base.files),
        base.root,
        base.ignored,
        (*base.problems, *wrong),
        trained,
    )


def _bare(given: Tensors, wanted: Tensors) -> Tensors:
    """Names without what wrappers put before all of them."""
    while given and not any(name in wanted for name in given):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in given)), None)
        if prefix is None:
            break
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given
