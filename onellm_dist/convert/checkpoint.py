"""What every reader gives and every writer takes: a model of one of three kinds, not read yet.

Names are canonical by kind: `llm` has transformers' names of that causal LM, `encoder` those of our
`Encoder`, `onellm` those of `OneLLMForConditionalGeneration`. The file of a format maps its own
names to these and back; no format knows another.
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
from onellm_dist.convert.tensors.lazy import LazyTensor, Shapes, Tensors, is_bitwise_equal
from onellm_dist.convert.tensors.writers import TensorFile

KINDS = {"llm": "a language model", "encoder": "a CLIP encoder", "onellm": "a complete OneLLM"}


@dataclass(frozen=True)
class ConversionOptions:
    """What the user may choose; every reader and writer takes what concerns it.

    Attributes:
        tokenizer: a file or directory with the tokenizer, if the source has none.
        dtype: dtype of all floating-point tensors written; None: each keeps its own.
        encoder_heads: attention heads of the encoder, if a file does not state them.
        upm_heads: attention heads of the UPM, if a file does not state them.
        llm_heads: attention heads of the LLM, if a file does not state them.
        act: activation of a CLIP, `quick_gelu` or `gelu`, if its file does not state it.
        base: the model that a training run started from, which has the frozen weights.
        allow: names of keys, or patterns with *, that may be missing, unexpected or not finite.
        shard_bytes: size of the largest safetensors file written.
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

    def is_allowed(self, name: str) -> bool:
        """Whether `allow` names a key."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.allow)


@dataclass(frozen=True)
class KeyProblem:
    """A key that does not fit the model.

    Attributes:
        kind: `missing`, `unexpected` or `mismatched`.
        name: the key.
        detail: its shape, or what is wrong.
    """

    kind: str
    name: str
    detail: str

    def __str__(self) -> str:
        words = {
            "missing": "missing key",
            "unexpected": "unknown key",
            "mismatched": "mismatched key",
        }
        return f"{words[self.kind]} {self.name} {self.detail}".rstrip()


@dataclass(frozen=True)
class ArchiveRange:
    """A zip archive of torch.save, which has checksums of its own.

    Attributes:
        path: the file.
        offset: its first byte in the file.
        length: its bytes; None: up to the end of the file.
    """

    path: Path
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose tensors are not read yet.

    Attributes:
        format: name of its format.
        kind: one of KINDS.
        config: OneLLMConfig, OneLLMVisionConfig, or the LLM's transformers config.
        tensors: canonical name -> tensor.
        files: the files that the weights come from.
        root: the folder that may have a tokenizer.
        ignored: keys that nothing uses.
        problems: keys that do not fit.
        notes: step, stage, world size and the like, for people.
        initialised: names of tensors that come from no file.
        checksums: file -> the SHA-256 that was recorded when it was written.
        archives: zip archives whose entries have checksums.
        generation: the LLM's generation settings (ends of answers and the like), if they are known.
    """

    format: str
    kind: str
    config: Any
    tensors: Tensors
    files: tuple[Path, ...]
    root: Path
    ignored: tuple[str, ...] = ()
    problems: tuple[KeyProblem, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    initialised: tuple[str, ...] = ()
    checksums: Mapping[Path, str] = field(default_factory=dict)
    archives: tuple[ArchiveRange, ...] = ()
    generation: Mapping[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most elements of the LLM; of the encoder, if there is no LLM."""
        counts: Counter[torch.dtype] = Counter()
        for name, tensor in self.tensors.items():
            if tensor.dtype.is_floating_point and (
                self.kind != "onellm" or name.startswith("llm.")
            ):
                counts[tensor.dtype] += tensor.numel
        return counts.most_common(1)[0][0] if counts else torch.float32

    def check(self, options: ConversionOptions) -> OpenedCheckpoint:
        """Check that all keys fit, and cast to the wanted dtype.

        Returns:
            The checkpoint in the wanted dtype. Allowed problems stay listed.

        Raises:
            UsageError: keys that do not fit and are not allowed; all of them are named.
        """
        refused = [problem for problem in self.problems if not options.is_allowed(problem.name)]
        if refused:
            verb = "keys do" if len(refused) > 1 else "key does"
            raise UsageError(
                f"{self.root}: {len(refused)} {verb} not fit\n"
                + "\n".join(f"  - {problem}" for problem in refused),
                "the model would be partly random, or lose something.",
                "give a complete checkpoint of this format and the right numbers of heads; or "
                "allow keys by name (--allow, with * too).",
            )
        if options.dtype is None:
            return self
        return replace(self, tensors=cast_tensors(self.tensors, options.dtype))

    def get_part(self, kind: str) -> OpenedCheckpoint:
        """The part of this model that is of `kind`.

        Raises:
            UsageError: the model has no such part.
        """
        if kind == self.kind:
            return self
        if self.kind != "onellm":
            raise UsageError(
                f"{self.root} is {KINDS[self.kind]}, not {KINDS[kind]}",
                "one cannot be made of the other.",
                "put an LLM and an encoder together with `onellm convert assemble`.",
            )
        config = self.config.text_config if kind == "llm" else self.config.vision
        tensors = strip_prefix(self.tensors, f"{kind}.")
        return replace(self, kind=kind, config=config, tensors=tensors)


@dataclass(frozen=True)
class TrainedWeights:
    """Weights of a training checkpoint that has no config: they replace those of a base model.

    Attributes:
        format: name of its format.
        tensors: name -> tensor, maybe with prefixes of wrappers.
        files: the files that they come from.
        root: the checkpoint's folder.
        notes: step, world size and the like, for people.
        archives: zip archives inside the files; empty: files that are archives are checked.
    """

    format: str
    tensors: Tensors
    files: tuple[Path, ...]
    root: Path
    notes: Mapping[str, Any] = field(default_factory=dict)
    archives: tuple[ArchiveRange, ...] = ()


@dataclass(frozen=True)
class OutputPlan:
    """What a format writes.

    Attributes:
        files: files of tensors.
        finish: writes everything small into the same folder, when the files are there.
    """

    files: tuple[TensorFile, ...]
    finish: Callable[[Path], None]


def cast_tensors(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Every floating-point tensor in `dtype`."""
    return {
        name: tensor.cast(dtype) if tensor.dtype.is_floating_point else tensor
        for name, tensor in tensors.items()
    }


def add_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors with `prefix` before every name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def strip_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose name begins with `prefix`, under names without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def fit_tensors(
    given: Mapping[str, tuple[str | None, LazyTensor]],
    wanted: Shapes,
    *,
    ignore: Callable[[str], bool] = lambda key: False,
) -> tuple[Tensors, tuple[str, ...], tuple[KeyProblem, ...]]:
    """Match a checkpoint's tensors with the parameters of a model.

    Args:
        given: the checkpoint's key -> (canonical name or None, tensor).
        wanted: canonical name -> shape. A tensor that differs by dimensions of size 1 is reshaped.
        ignore: whether nothing uses a key.

    Returns:
        (tensors under their canonical names and shapes, ignored keys, keys that do not fit).
    """
    tensors: Tensors = {}
    ignored: list[str] = []
    problems: list[KeyProblem] = []
    mismatched: set[str] = set()
    for key, (name, tensor) in given.items():
        if name is None or name not in wanted:
            if ignore(key):
                ignored.append(key)
            else:
                problems.append(KeyProblem("unexpected", key, str(list(tensor.shape))))
        elif _squeeze(wanted[name]) != _squeeze(tensor.shape):
            detail = f"has shape {list(tensor.shape)}, the model needs {list(wanted[name])}"
            problems.append(KeyProblem("mismatched", key, detail))
            mismatched.add(name)
        elif tensor.dtype not in _PLAIN_DTYPES:
            stored = str(tensor.dtype).removeprefix("torch.")
            detail = f"is stored as {stored}: codes of a quantisation, not the weight's numbers"
            problems.append(KeyProblem("mismatched", key, detail))
            mismatched.add(name)
        else:
            tensors[name] = tensor.reshape(wanted[name])
    problems += [
        KeyProblem("missing", name, str(list(shape)))
        for name, shape in wanted.items()
        if name not in tensors and name not in mismatched
    ]
    return tensors, tuple(sorted(ignored)), tuple(problems)


_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _squeeze(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def build_on_meta(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A model whose parameters take no memory.

    Args:
        build: builds the model; it is called on the meta device.
    """
    with torch.device("meta"):
        return build()


def get_parameter_shapes(build: Callable[[], torch.nn.Module]) -> Shapes:
    """Shapes of a model's parameters; tied ones are listed once.

    Args:
        build: builds the model; it is called on the meta device.
    """
    return {name: tuple(p.shape) for name, p in build_on_meta(build).named_parameters()}


def drop_tied_copies(
    state: Tensors, model: torch.nn.Module
) -> tuple[Tensors, list[str], list[KeyProblem]]:
    """Leave out the copies of tied parameters (a head that is the embedding).

    Args:
        state: the tensors under the names of the model.
        model: the model.

    Returns:
        (the tensors, names of copies that are equal, copies that are not: they would be lost).
    """
    first = {id(p): name for name, p in model.named_parameters()}
    tied = {
        name: first[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if first[id(p)] != name
    }
    kept = dict(state)
    ignored: list[str] = []
    problems: list[KeyProblem] = []
    for name in sorted(tied.keys() & state.keys()):
        copy, original = kept.pop(name), tied[name]
        if original not in state:
            kept[original] = copy  # the model has one of the two names, the file the other
        elif is_bitwise_equal(copy, state[original]):
            ignored.append(name)
        else:
            detail = f"differs from {original}, the embedding that config.json ties it to"
            problems.append(KeyProblem("unexpected", name, detail))
    return kept, ignored, problems
