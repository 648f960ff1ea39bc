"""Compare two checkpoints of any formats: tensor by tensor, and by the logits of a forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.progress import progress
from onellm_dist.convert.checkpoint import KINDS, OpenedCheckpoint
from onellm_dist.convert.tensors.lazy import LazyTensor, is_bitwise_equal, read_equal_blocks
from onellm_dist.modalities import get_modality
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration

TOKENS = 16
"""Length of the random text that a forward runs on."""


@dataclass
class CheckpointComparison:
    """What differs between checkpoints A and B.

    Attributes:
        kind: the part that both have.
        same: number of tensors that are equal bit for bit.
        differing: name -> largest absolute difference, for tensors of equal shapes.
        dtypes: name -> both dtypes, where they differ.
        shapes: name -> (shape in A, shape in B), where they differ.
        only_a: names that A alone has.
        only_b: names that B alone has.
        logits: largest absolute difference of the logits; None: no forward was asked for.
    """

    kind: str
    same: int = 0
    differing: dict[str, float] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    logits: float | None = None

    def is_equal(self, tolerance: float) -> bool:
        """Whether both are the same within `tolerance` (0: bit for bit, dtypes included)."""
        if self.shapes or self.only_a or self.only_b:
            return False
        if self.logits is not None and not self.logits <= tolerance:
            return False
        if tolerance == 0:
            return not self.differing
        return all(difference <= tolerance for difference in self.differing.values())

    def describe(self) -> list[str]:
        """Lines with everything that differs."""
        values = [
            f"{name}: up to {difference:.3g} apart {self.dtypes.get(name, '')}".rstrip()
            for name, difference in self.differing.items()
        ]
        shapes = [f"{name}: {list(a)} and {list(b)}" for name, (a, b) in self.shapes.items()]
        lines = [
            f"compared as {KINDS[self.kind]}: {format_count(self.same, 'tensor')} equal bit for bit"
        ]
        for title, found in (
            ("other values", values),
            ("other shapes", shapes),
            ("only in A", self.only_a),
            ("only in B", self.only_b),
        ):
            if found:
                lines += [f"{title} ({len(found)}):", *(f"  {line}" for line in found)]
        if self.logits is not None:
            lines.append(f"logits: up to {self.logits:.3g} apart")
        return lines


def compare(
    a: OpenedCheckpoint,
    b: OpenedCheckpoint,
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    logits: bool = False,
    seed: int = 0,
    quiet: bool = True,
) -> CheckpointComparison:
    """Compare the part that both checkpoints have, one tensor at a time.

    Args:
        a: a checkpoint.
        b: another checkpoint.
        inputs: arguments of forward (`input_ids`, `image_values`, ...); default: random ones.
        logits: compare a forward too; both models are built in memory, in fp32.
        seed: seed of random inputs.
        quiet: show no progress.

    Raises:
        UsageError: the checkpoints have no part in common, or logits of encoders are asked for.
    """
    kind = a.kind if a.kind == b.kind else a.kind if b.kind == "onellm" else b.kind
    a, b = a.get_part(kind), b.get_part(kind)
    found = CheckpointComparison(
        kind,
        only_a=sorted(set(a.tensors) - set(b.tensors)),
        only_b=sorted(set(b.tensors) - set(a.tensors)),
    )
    shared = [name for name in a.tensors if name in b.tensors]
    for name in progress(shared, "Comparing", unit="tensors", enabled=not quiet):
        left, right = a.tensors[name], b.tensors[name]
        if left.shape != right.shape:
            found.shapes[name] = (left.shape, right.shape)
        elif is_bitwise_equal(left, right):
            found.same += 1
        else:
            found.differing[name] = _compute_distance(left, right)
            if left.dtype != right.dtype:
                found.dtypes[name] = f"{left.dtype} and {right.dtype}".replace("torch.", "")
    if logits and not (found.shapes or found.only_a or found.only_b):
        given = dict(inputs) if inputs is not None else draw_inputs(a, seed)
        found.logits = float((compute_logits(a, given) - compute_logits(b, given)).abs().max())
    return found


def _compute_distance(a: LazyTensor, b: LazyTensor) -> float:
    """Largest absolute difference; NaN if one of them holds NaN."""
    left, right = (read_equal_blocks(tensor.cast(torch.float64)) for tensor in (a, b))
    distances = [
        (x.view(torch.float64) - y.view(torch.float64)).abs().max()
        for x, y in zip(left, right, strict=True)
    ]
    return float(torch.stack(distances).max())


def build_model(opened: OpenedCheckpoint) -> torch.nn.Module:
    """The model with its weights in memory, fp32.

    Raises:
        UsageError: an encoder, which has no logits.
    """
    if opened.kind == "encoder":
        raise UsageError(
            "an encoder has no logits",
            "there is nothing to compare.",
            "compare its tensors alone, or complete models.",
        )
    with torch.device("meta"):
        model: Any = (
            OneLLMForConditionalGeneration(opened.config)
            if opened.kind == "onellm"
            else AutoModelForCausalLM.from_config(opened.config, trust_remote_code=False)
        )
    names = {name for name, _ in model.named_parameters()}
    state = {n: t.read().float() for n, t in opened.tensors.items() if n in names}
    _build_buffers(model)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    built: torch.nn.Module = model.eval()
    return built


def _build_buffers(model: Any) -> None:
    """Build rotary tables again, outside the meta device: they are computed, not saved."""
    for name, module in model.named_modules():
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, type(module)(module.config))


@torch.no_grad()
def compute_logits(opened: OpenedCheckpoint, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a model, fp32; the model is freed afterwards.

    Args:
        opened: the model.
        inputs: arguments of its forward.

    Raises:
        UsageError: an encoder, which has no logits.
    """
    logits: torch.Tensor = build_model(opened)(**inputs).logits
    return logits.float()


def draw_inputs(opened: OpenedCheckpoint, seed: int) -> dict[str, torch.Tensor]:
    """A random text of TOKENS tokens, and a random value of every modality that the model reads.

    Args:
        opened: the model.
        seed: seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    config = opened.config
    text = config.text_config if isinstance(config, OneLLMConfig) else config
    inputs = {"input_ids": torch.randint(3, text.vocab_size, (1, TOKENS), generator=generator)}
    if isinstance(config, OneLLMConfig):
        for name in config.modalities:
            shape = (1, *get_modality(name).value_shape)
            inputs[f"{name}_values"] = torch.randn(shape, generator=generator)
    return inputs
