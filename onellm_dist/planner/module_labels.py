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

from onellm_dist.model.losses.preference import build_reference

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
        self._encoders: set[nn.Module] = set()
        self._patches: set[nn.Module] = set()
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
        """Follow the modules of the model while the context is open; forward runs once in it.

        A reference that is compared with has the labels of the parts that it copies.
        """
        own, reference = self._list_modules(self._model), build_reference(self._model)
        hooked = {id(module) for module, _ in own}
        own += [pair for pair in self._list_modules(reference) if id(pair[0]) not in hooked]
        with ExitStack() as stack:
            for module, get_label in own:
                for handle in self._hook(module, get_label):
                    stack.callback(handle.remove)
            self._record()
            yield

    def _list_modules(self, model: Any) -> list[tuple[nn.Module, Any]]:
        """Modules of a OneLLM, and what gives the label of each while it runs."""
        children = [(UPM, model.upm), (LLM, model.llm)]
        children += [(EMBEDDING, model.get_input_embeddings())]
        children += [(HEAD, model.get_output_embeddings())]
        for container in (model.tokenizers, model.projectors):
            for name, module in container.items():
                inner = [m for m in module.children() if container is model.projectors]
                children += [(get_modality_label(name), m) for m in (module, *inner)]
        self._encoders.add(model.encoder)
        self._patches.add(model.encoder.patches)
        return [
            (model.encoder, lambda: VISUAL if self._pictures else TOKENIZED),
            (model.encoder.patches, lambda: VISUAL),
            *((module, lambda x=label: x) for label, module in children),
        ]

    def _hook(self, module: nn.Module, get_label: Any) -> tuple[Any, Any]:
        def enter(*_: Any) -> None:
            if torch._C._current_autograd_node() is not None:  # recomputation
                return
            self._stack.append(get_label())
            if module in self._patches:
                self._pictures = True
            self._record()

        def leave(*_: Any) -> None:
            if torch._C._current_autograd_node() is not None:
                return
            label = self._stack.pop()
            if not label.startswith("modality."):
                self._after = label
            if module in self._encoders:
                self._pictures = False
            self._record()

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def _record(self) -> None:
        """Remember from which autograd node on the current part is at work."""
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._labels.append(self._stack[-1] if self._stack else f"{GLUE}.{self._after}")
