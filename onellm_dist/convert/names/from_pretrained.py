"""Names of a checkpoint as `from_pretrained` would match them, with transformers' own rules.

Checkpoints on the Hub have names of older versions (`embed_out`), lack the base model's prefix
(GPT-2), or have one tensor per expert where the model has one for all.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from functools import partial
from typing import Any, cast

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from onellm_dist.common.errors import OneLLMError
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors

_Sources = dict[str, list[tuple[str, LazyTensor]]]
"""Pattern of a converter -> the keys that it matched, with their tensors."""


def rename_state(state: Tensors, model: Any) -> Tensors:
    """The tensors under the names of the model's parameters; unknown keys keep theirs.

    Args:
        state: the tensors of a checkpoint.
        model: the model, on the meta device.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known: dict[str, Any] = model.state_dict()
    named: Tensors = {}
    sources: dict[str, _Sources] = defaultdict(lambda: defaultdict(list))
    for key in sorted(state, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if name not in known and key in known:
            name, pattern = key, None
        if pattern is not None and name in known:
            sources[name][pattern].append((key, state[key]))
        elif name in known and name not in named:
            named[name] = state[key]
        else:
            named[key] = state[key]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for name, found in sources.items():
        named |= _join(name, found, by_pattern[next(iter(found))], model, known)
    return named


def _join(
    name: str, found: _Sources, rule: WeightConverter, model: Any, known: dict[str, Any]
) -> Tensors:
    """The parameters that a rule makes of several tensors, made when they are read."""
    targets = [name.replace(rule.target_patterns[0], target) for target in rule.target_patterns]
    tensors = [tensor for group in found.values() for _, tensor in group]
    stored = sum(tensor.numel for tensor in tensors)
    if stored != sum(math.prod(known[target].shape) for target in targets if target in known):
        # Too few or too many: under a shape that fits nothing, so that it is refused by name.
        return {name: LazyTensor((stored,), tensors[0].dtype, tensors[0].load)}

    def load(target: str) -> torch.Tensor:
        own = copy.deepcopy(rule)
        for pattern, group in found.items():
            for key, tensor in group:
                own.add_tensor(name, key, pattern, cast(Any, tensor.read))
        made = own.convert(name, model=model, config=model.config)[target]
        value: torch.Tensor = made[0] if isinstance(made, list) else made
        if value.shape != known[target].shape:
            raise OneLLMError(
                f"{target} would have shape {list(value.shape)}, not {list(known[target].shape)}",
                "transformers' rule for these names does not fit the checkpoint.",
                "save it with save_pretrained of the version that wrote it.",
            )
        return value

    return {
        target: LazyTensor(tuple(known[target].shape), tensors[0].dtype, partial(load, target))
        for target in targets
    }
