"""`onellm convert verify A B`: two checkpoints of any formats, tensor by tensor after mapping, and by the logits of a forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.convert.checkpoint import KINDS, Opened, Options
from onellm_dist.convert.inspect import opened_any
from onellm_dist.convert.tensors.lazy import LazyTensor, equal_blocks, same_bytes
from onellm_dist.convert.tensors.safetensors_files import read_safetensors
from onellm_dist.modalities import get_modality
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration

TOKENS = 16
"""Length of the random text that a forward is run on."""


@dataclass
class Comparison:
    """What differs.

    Attributes:
        kind: the part that both have.
        same: number of tensors equal bit for bit.
        differing: name -> largest absolute difference (shapes are equal, values or dtypes are not).
        shapes: name -> (shape in A, shape in B), where they differ.
        only_a, only_b: names that one of them alone has.
        logits: largest absolute difference of the logits, where a forward was asked for.
    """

    kind: str
    same: int = 0
    differing: dict[str, float] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    logits: float | None = None

    def equal(self, tolerance: float) -> bool:
        """Whether both are the same within `tolerance` (0: bit for bit, dtypes included)."""
        unlike = bool(self.shapes or self.only_a or self.only_b)
        values = (
            not self.differing
            if tolerance == 0
            else all(d <= tolerance for d in self.differing.values())
        )
        return not unlike and values and (self.logits is None or self.logits <= max(tolerance, 0.0))


def compare(
    a: Opened,
    b: Opened,
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    logits: bool = False,
    seed: int = 0,
    quiet: bool = True,
) -> Comparison:
    """Compare the part that both have, one tensor at a time; with `logits` both are built whole, in fp32.

    Args:
        inputs: arguments of forward (`input_ids`, `image_values`, ...); random ones where None.
    """
    kind = a.kind if a.kind == b.kind else a.kind if b.kind == "onellm" else b.kind
    a, b = a.as_kind(kind), b.as_kind(kind)
    found = Comparison(
        kind,
        only_a=sorted(set(a.tensors) - set(b.tensors)),
        only_b=sorted(set(b.tensors) - set(a.tensors)),
    )
    shared = [name for name in a.tensors if name in b.tensors]
    for name in progress(shared, "Comparing", unit="tensors", enabled=not quiet):
        left, right = a.tensors[name], b.tensors[name]
        if left.shape != right.shape:
            found.shapes[name] = (left.shape, right.shape)
        elif same_bytes(left, right):
            found.same += 1
        else:
            found.differing[name] = _distance(left, right)
            if left.dtype != right.dtype:
                found.dtypes[name] = f"{left.dtype} and {right.dtype}".replace("torch.", "")
    if logits and not (found.shapes or found.only_a or found.only_b):
        given = dict(inputs) if inputs is not None else random_inputs(a, seed)
        found.logits = float((forward(a, given) - forward(b, given)).abs().max())
    return found


def _distance(a: LazyTensor, b: LazyTensor) -> float:
    """Largest absolute difference; NaN where one of them has it."""
    pairs = zip(
        equal_blocks(a.cast(torch.float64)), equal_blocks(b.cast(torch.float64)), strict=True
    )
    return float(
        torch.stack(
            [(x.view(torch.float64) - y.view(torch.float64)).abs().max() for x, y in pairs]
        ).max()
    )


def build(opened: Opened) -> torch.nn.Module:
    """The model with its weights, fp32, in memory.

    Raises:
        UsageError: an encoder, which has no logits.
    """
    if opened.kind == "encoder":
        raise UsageError(
            "an encoder has no logits",
            "nothing can be run.",
            "compare its tensors alone, or whole models.",
        )
    with torch.device("meta"):
        model: Any = (
            OneLLMForConditionalGeneration(opened.config)
            if opened.kind == "onellm"
            else AutoModelForCausalLM.from_config(opened.config)
        )
    names = {name for name, _ in model.named_parameters()}
    state = {n: t.read().float() for n, t in opened.tensors.items() if n in names}
    _materialise_buffers(model, opened)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _materialise_buffers(model: Any, opened: Opened) -> None:
    """Rotary tables are computed when a model is made, not saved: take them from one that is made without the meta device."""
    for name, module in model.named_modules():
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(owner, leaf, type(module)(module.config))


@torch.no_grad()
def forward(opened: Opened, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a model on inputs, fp32; the model is gone afterwards."""
    logits: torch.Tensor = build(opened)(**inputs).logits
    return logits.float()


def random_inputs(opened: Opened, seed: int) -> dict[str, torch.Tensor]:
    """A random text of TOKENS tokens, and a random value of every modality where the model reads any."""
    generator = torch.Generator().manual_seed(seed)
    text = opened.config.text_config if isinstance(opened.config, OneLLMConfig) else opened.config
    inputs = {"input_ids": torch.randint(3, text.vocab_size, (1, TOKENS), generator=generator)}
    if isinstance(opened.config, OneLLMConfig):
        for name in opened.config.modalities:
            inputs[f"{name}_values"] = torch.randn(
                (1, *get_modality(name).value_shape), generator=generator
            )
    return inputs


def verify_command(
    a: Path,
    b: Path,
    options: Options,
    *,
    logits: bool,
    inputs: Path | None,
    tolerance: float,
    seed: int,
    from_a: str | None,
    from_b: str | None,
) -> int:
    """`onellm convert verify`: prints what differs. Returns the exit code: 0 the same, 1 not."""
    left, right = opened_any(a, options, from_a), opened_any(b, options, from_b)
    given = (
        None if inputs is None else {name: t.read() for name, t in read_safetensors(inputs).items()}
    )
    found = compare(
        left, right, inputs=given, logits=logits or inputs is not None, seed=seed, quiet=False
    )
    print(
        f"A {a}: {left.format}\nB {b}: {right.format}\ncompared as {KINDS[found.kind]}: {found.same} tensors equal bit for bit"
    )
    for title, lines in (
        (
            "other values",
            [
                f"{n}: up to {d:.3g} apart {found.dtypes.get(n, '')}".rstrip()
                for n, d in found.differing.items()
            ],
        ),
        ("other shapes", [f"{n}: {list(x)} and {list(y)}" for n, (x, y) in found.shapes.items()]),
        ("only in A", found.only_a),
        ("only in B", found.only_b),
    ):
        if lines:
            print(f"{title} ({len(lines)}):", *(f"  {line}" for line in lines), sep="\n")
    if found.logits is not None:
        print(f"logits: up to {found.logits:.3g} apart")
    same = found.equal(tolerance)
    print(
        "the same"
        if same and tolerance == 0
        else f"the same within {tolerance:g}"
        if same
        else "NOT the same"
    )
    return EXIT_DONE if same else EXIT_FAILED
