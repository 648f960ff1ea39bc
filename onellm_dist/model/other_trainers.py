"""What the trainers of transformers and trl need of a model, beside a forward with labels."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import all_modalities
from onellm_dist.model.llm.call import run_padded
from onellm_dist.model.llm.dropout import update_dropout
from onellm_dist.model.spans.padded import VALUES_SUFFIX, PaddedInputs

Forward = TypeVar("Forward", bound=Callable[..., Any])


def name_values(forward: Forward) -> Forward:
    """List the values of all modalities in a forward's signature.

    transformers' Trainer drops the columns of a dataset that the signature does not list.

    Args:
        forward: a method whose last parameter is `**values`.
    """
    signature = inspect.signature(forward)
    *listed, rest = signature.parameters.values()
    listed += [
        inspect.Parameter(name + VALUES_SUFFIX, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in all_modalities()
    ]
    vars(forward)["__signature__"] = signature.replace(parameters=[*listed, rest])
    return forward


def take_options(values: dict[str, Any]) -> int | torch.Tensor | None:
    """Remove from a forward's further arguments those that are not media.

    Args:
        values: the arguments; `use_cache` and `return_dict` say nothing here.

    Returns:
        The number of supervised tokens by which a summed loss is divided; None: those given.

    Raises:
        UsageError: a tuple is asked for.
    """
    values.pop("use_cache", None)
    if values.pop("return_dict", None) is False:
        raise UsageError(
            "return_dict=False", "forward returns an output with names.", "leave it out."
        )
    items: int | torch.Tensor | None = values.pop("num_items_in_batch", None)
    return items


class WorksInTrainers:
    """A mixin of the model: what trainers ask of it."""

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, for trainers that compute the loss themselves."""
        return TextBackbone(self)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute every block of encoder, UPM and LLM in backward.

        Args:
            gradient_checkpointing_kwargs: options of torch's checkpoint; default: non-reentrant.
            kwargs: as of transformers' method.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        with warnings.catch_warnings():
            # transformers 5.23 renames the method; 5.17 has only this name.
            warnings.simplefilter("ignore", FutureWarning)
            parent: Any = super()
            parent.gradient_checkpointing_enable(options, **kwargs)
        if not options["use_reentrant"]:
            # Else text embeddings would get gradients that nobody needs.
            own: Any = self
            own.disable_input_require_grads()


class TextBackbone(nn.Module):
    """A model up to its head, with one state for each text token: what trl's trainers call.

    They score token t + 1 with the state at t. So the state at t is that of the position before
    token t + 1, which may be the end of a span.

    Args:
        model: a OneLLM; it is not registered as a part of this module.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = (model,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._model[0].llm, name)  # plans of parallelism and the like

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        modality_order: Any = None,
        **values: Any,
    ) -> BaseModelOutput:
        """States [B, S, d] of texts with media.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 for padding.
            modality_order: as of the model's forward.
            values: as of the model's forward.
        """
        (model,) = self._model
        take_options(values)
        inputs = model.build_inputs(input_ids, attention_mask, values, modality_order)
        update_dropout(model.llm)
        states = _run_without_head(model, inputs, input_ids)
        places = _find_places(inputs, input_ids.shape[1])
        kept = states.gather(1, places[..., None].expand(*places.shape, states.shape[-1]))
        return BaseModelOutput(last_hidden_state=kept)


def _run_without_head(model: Any, inputs: PaddedInputs, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, S + R, d]: what the head would read."""
    head = model.llm.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: args[0])
    try:
        return run_padded(
            model.llm,
            model.llm_support,
            inputs.embeds,
            token_ids=inputs.get_token_ids(input_ids),
            mask=inputs.mask,
            position_ids=inputs.position_ids,
        )
    finally:
        handle.remove()


def _find_places(inputs: PaddedInputs, length: int) -> torch.Tensor:
    """[B, S]: the position whose state predicts the text token behind each text token."""
    batch, total = inputs.text.shape
    at = torch.arange(total, device=inputs.text.device).expand(batch, total)
    own = at.new_zeros((batch, length + 1))
    # Text tokens alone; what stands inside spans is written to a column that is dropped.
    own.scatter_(1, torch.where(inputs.text < 0, length, inputs.text), at)
    last = own[:, length - 1 : length]
    return torch.cat([own[:, 1:length] - 1, last], dim=1)
