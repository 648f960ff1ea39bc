"""Which part of the model an operation belongs to, in forward, recomputation and backward.

In forward, hooks follow the modules. Autograd numbers its nodes in the order in which forward made
them, so a node that runs in backward belongs to the part that was at work when it got its number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

VISUAL = "encoder.visual"
"""The encoder on pictures, its patch embedding included."""
TOKENIZED = "encoder.tokenized"
"""The encoder on the tokens of tokenizers."""
UPM = "upm"
EMBEDDING = "embedding"
LLM = "llm"
HEAD = "head"
GLUE = "glue"
"""What runs between the modules; `glue.PART` follows the last of them that ran."""


def get_modality_label(name: str) -> str:
    """The part that holds a modality's own modules: its tokenizer and its projections."""
    return f"modality.{name}"


class ModuleLabels:
    """The part of the model that is at work.

    Args:
        model: a OneLLM.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._stack: list[str] = []
        self._after = "start"
        self._pictures = False
        self._starts: list[int] = []
        self._labels: list[str] = []

    @property
    def current(self) -> str:
        """The part at work."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1] if self._stack else f"{GLUE}.{self._after}"
        place = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._labels[max(place, 0)]

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Follow the modules of the model while the context is open; forward runs once in it."""
        model, children = self._model, [(UPM, self._model.upm), (LLM, self._model.llm)]
        children += [(EMBEDDING, model.get_input_embeddings())]
        children += [(HEAD, model.get_output_embeddings())]
        for container in (model.tokenizers, model.projectors):
            for name, module in container.items():
                inner = [m for m in module.children() if container is model.projectors]
                children += [(get_modality_label(name), m) for m in (module, *inner)]
        with ExitStack() as stack:
            for handle in (
                *self._hook(model.encoder, lambda: VISUAL if self._pictures else TOKENIZED),
                *self._hook(model.encoder.patches, lambda: VISUAL),
                *(h for label, module in children for h in self._hook(module, lambda x=label: x)),
            ):
                stack.callback(handle.remove)
            self._record()
            yield

    def _hook(self, module: nn.Module, get_label: Any) -> tuple[Any, Any]:
        def enter(*_: Any) -> None:
            if torch._C._current_autograd_node() is not None:  # recomputation
                return
            self._stack.append(get_label())
            if module is self._model.encoder.patches:
                self._pictures = True
            self._record()

        def leave(*_: Any) -> None:
            if torch._C._current_autograd_node() is not None:
                return
            label = self._stack.pop()
            if not label.startswith("modality."):
                self._after = label
            if module is self._model.encoder:
                self._pictures = False
            self._record()

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def _record(self) -> None:
        """Remember from which autograd node on the current part is at work."""
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._labels.append(self._stack[-1] if self._stack else f"{GLUE}.{self._after}")
