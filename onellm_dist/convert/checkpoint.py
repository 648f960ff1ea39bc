"""What every reader gives and every writer takes: a model of one of three kinds, its tensors not read yet.

Names are canonical by kind: `llm` has transformers' names of that causal LM, `encoder` those of our `Encoder`, `onellm` those of
`OneLLMForConditionalGeneration`. A format's file maps its own names to these and back; no format knows another.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.convert.tensors.writers import TensorFile

Tensors = dict[str, LazyTensor]
Shapes = dict[str, tuple[int, ...]]
KINDS = {"llm": "a language model", "encoder": "a CLIP encoder", "onellm": "a whole OneLLM"}


@dataclass(frozen=True)
class Options:
    """What the user may say about a conversion; every reader takes what concerns it.

    Attributes:
        tokenizer: a file or directory, where the source has none.
        dtype: of all floating-point tensors written; each keeps its own where None.
        encoder_heads, upm_heads, llm_heads: attention heads, where a file does not tell.
        act: activation of a CLIP whose file does not tell, `quick_gelu` or `gelu`.
        base: the directory with the frozen weights of a run, where the checkpoint's own `model.path` is not here.
        allow: names (or patterns with *) of keys that may be missing, unexpected or not finite.
        shard_bytes: largest safetensors file written.
    """

    tokenizer: Path | None = None
    dtype: torch.dtype | None = None
    encoder_heads: int | None = None
    upm_heads: int | None = None
    llm_heads: int | None = None
    act: str | None = None
    base: Path | None = None
    allow: tuple[str, ...] = ()
    shard_bytes: int = 5_000_000_000

    def allows(self, name: str) -> bool:
        """Whether `allow` names it."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.allow)


@dataclass(frozen=True)
class Problem:
    """A key that does not fit: `missing`, `unexpected` or `mismatched`."""

    kind: str
    name: str
    detail: str

    def __str__(self) -> str:
        words = {
            "missing": "nothing gives",
            "unexpected": "unknown key",
            "mismatched": "does not fit:",
        }
        return f"{words[self.kind]} {self.name} {self.detail}".rstrip()


@dataclass(frozen=True)
class Opened:
    """A checkpoint, opened.

    Attributes:
        format: name of its format.
        kind: one of KINDS.
        config: OneLLMConfig, OneLLMVisionConfig, or the LLM's transformers config.
        tensors: canonical name to tensor.
        files: those that the weights come from.
        root: the folder that may hold a tokenizer.
        ignored: keys that nothing uses.
        problems: what does not fit.
        notes: step, stage, world size and the like, for people.
        made: names of tensors that come from no file (initialised).
    """

    format: str
    kind: str
    config: Any
    tensors: Tensors
    files: tuple[Path, ...]
    root: Path
    ignored: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """That of most elements of the LLM (of the encoder, where there is none)."""
        counts: Counter[torch.dtype] = Counter()
        for name, tensor in self.tensors.items():
            if tensor.dtype.is_floating_point and (
                self.kind != "onellm" or name.startswith("llm.")
            ):
                counts[tensor.dtype] += tensor.numel
        return counts.most_common(1)[0][0] if counts else torch.float32

    def checked(self, options: Options) -> Opened:
        """Itself, cast as wanted; allowed problems are left out.

        Raises:
            UsageError: keys that do not fit and are not allowed; all of them are named.
        """
        refused = [problem for problem in self.problems if not options.allows(problem.name)]
        if refused:
            raise UsageError(
                f"{self.root}: {len(refused)} key{'s do' if len(refused) > 1 else ' does'} not fit\n"
                + "\n".join(f"  - {problem}" for problem in refused),
                "the model would be partly random, or lose something.",
                "give a whole checkpoint of this format and the right numbers of heads; or allow keys by name (--allow, with * too).",
            )
        return (
            self
            if options.dtype is None
            else replace(self, tensors=cast_all(self.tensors, options.dtype))
        )

    def as_kind(self, kind: str) -> Opened:
        """The part of this model that is of `kind`.

        Raises:
            UsageError: it has none.
        """
        if kind == self.kind:
            return self
        if self.kind != "onellm":
            raise UsageError(
                f"{self.root} is {KINDS[self.kind]}, not {KINDS[kind]}",
                "one cannot be made of the other.",
                "put an LLM and an encoder together with `onellm convert assemble`.",
            )
        prefix, config = {
            "llm": ("llm.", self.config.text_config),
            "encoder": ("encoder.", self.config.vision),
        }[kind]
        return replace(self, kind=kind, config=config, tensors=without_prefix(self.tensors, prefix))


@dataclass(frozen=True)
class Plan:
    """What a writer will write: files of tensors, and then, into the same folder, everything small."""

    files: tuple[TensorFile, ...]
    finish: Callable[[Path], None]


def cast_all(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Every floating-point tensor in `dtype`."""
    return {
        name: tensor.cast(dtype) if tensor.dtype.is_floating_point else tensor
        for name, tensor in tensors.items()
    }


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Every name with `prefix` before it."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose name begins with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def fitted(
    given: Mapping[str, tuple[str | None, LazyTensor]],
    wanted: Shapes,
    *,
    ignore: Callable[[str], bool] = lambda key: False,
) -> tuple[Tensors, tuple[str, ...], tuple[Problem, ...]]:
    """Tensors under their canonical names and shapes.

    Args:
        given: the source's key -> (canonical name or None, tensor).
        wanted: canonical name -> shape; a tensor with as many elements in another shape is reshaped.
        ignore: keys that nothing uses.

    Returns:
        (tensors, ignored keys, what does not fit).
    """
    tensors: Tensors = {}
    ignored: list[str] = []
    problems: list[Problem] = []
    for key, (name, tensor) in given.items():
        if name is None or name not in wanted:
            if ignore(key):
                ignored.append(key)
            else:
                problems.append(Problem("unexpected", key, str(list(tensor.shape))))
        elif torch.Size(wanted[name]).numel() != tensor.numel or _squeezed(
            wanted[name]
        ) != _squeezed(tensor.shape):
            problems.append(
                Problem(
                    "mismatched",
                    key,
                    f"has shape {list(tensor.shape)}, the model needs {list(wanted[name])}",
                )
            )
        else:
            tensors[name] = tensor.reshaped(wanted[name])
    spoilt = {given[p.name][0] for p in problems if p.kind == "mismatched"}
    problems += [
        Problem("missing", name, str(list(shape)))
        for name, shape in wanted.items()
        if name not in tensors and name not in spoilt
    ]
    return tensors, tuple(sorted(ignored)), tuple(problems)


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def parameter_shapes(build: Callable[[], torch.nn.Module]) -> Shapes:
    """Shapes of the parameters of a model that is built without memory; tied ones stand once."""
    with torch.device("meta"):
        model = build()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
