"""From the values of any modalities to the tokens that the LLM reads (paper, section 3).

Every call runs the same modules in the same order, on empty tensors where a modality has no values,
so that the collectives of a sharded model match on all ranks. Only a pass that no rank will ever
need (`find_idle_passes`) is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import QUERY_TOKENS, get_modality
from onellm_dist.model.pixels import make_input
from onellm_dist.model.placement import get_device
from onellm_dist.model.sequence_lengths import SequenceLengths
from onellm_dist.model.spans.positions import SpanNumbers, add_span_positions
from onellm_dist.model.trainable import has_trainable

if TYPE_CHECKING:
    from onellm_dist.model.onellm import OneLLMForConditionalGeneration


VISUAL_PASS, TOKENIZED_PASS = "visual", "tokenized"
"""The two passes through the encoder: frames, and what tokenizers make of all other values."""


def find_idle_passes(
    model: OneLLMForConditionalGeneration, modalities: Collection[str]
) -> frozenset[str]:
    """Passes through the encoder that a run can leave out on all ranks, without any other number.

    Nothing trains in such a pass, and no sample of the run has values for it.

    Args:
        model: a OneLLM whose parameters are frozen as in the run.
        modalities: those of all samples that any rank reads, for training or validation.
    """
    config, found = model.config, set()
    encoder_trains = has_trainable(model.encoder)
    tokenizers_train = has_trainable(model.tokenizers)
    if not encoder_trains and not set(config.visual_modalities) & set(modalities):
        found.add(VISUAL_PASS)
    trains = encoder_trains or tokenizers_train
    if not trains and not set(config.tokenizer_modalities) & set(modalities):
        found.add(TOKENIZED_PASS)
    return frozenset(found)


def compute_modality_tokens(
    model: OneLLMForConditionalGeneration,
    values: Mapping[str, torch.Tensor],
    numbers: SpanNumbers | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Encode, project and route the values of all modalities.

    Args:
        model: a OneLLM.
        values: modality -> [n_m, *value_shape], floats or 8-bit pixels; a modality that is not
            named has n_m = 0.
        numbers: number of each span within its medium; default: 0.

    Returns:
        (modality -> [n_m, Q, d] tokens, modality -> [Q, E] router weights), with every modality of
        the model in the model's order.

    Raises:
        OneLLMError: values have another shape than their modality, or numbers do not fit them.
    """
    names = model.config.modalities
    features = compute_features(model, values)
    inputs, router_weights = [], {}
    for name in names:
        x, router_weights[name] = model.get_projector(name)(features[name])
        inputs.append(x)
    counts = [len(x) for x in inputs]
    mixed = _run_upm(model, inputs, router_weights).split([n * QUERY_TOKENS for n in counts])
    tokens = {}
    for name, rows, n in zip(names, mixed, counts, strict=True):
        projector = model.get_projector(name)
        projected = projector.out_proj(rows)
        tokens[name] = add_span_positions(
            model.config.span_positions,
            projector,
            projected.reshape(n, QUERY_TOKENS, projected.shape[-1]),
            None if numbers is None else numbers.get(name),
        )
    return tokens, router_weights


def compute_features(
    model: OneLLMForConditionalGeneration, values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the encoder gives for each modality: modality -> [n_m, P + L_m, D].

    Args:
        model: a OneLLM.
        values: modality -> [n_m, *value_shape]; a modality that is not named has n_m = 0.

    Raises:
        OneLLMError: values have another shape than their modality.
    """
    complete = {
        name: _check_value(model, name, values.get(name)) for name in model.config.modalities
    }
    passes = (
        (VISUAL_PASS, model.config.visual_modalities, _encode_visual),
        (TOKENIZED_PASS, model.config.tokenizer_modalities, _encode_tokenized),
    )
    features: dict[str, torch.Tensor] = {}
    for kind, names, encode in passes:
        if kind in model.idle_passes and not any(len(complete[name]) for name in names):
            features |= {name: _make_no_features(model, name) for name in names}
        else:
            features |= encode(model, complete)
    return features


def _make_no_features(model: OneLLMForConditionalGeneration, name: str) -> torch.Tensor:
    """[0, P + L, D]: what the encoder gives for no values of a modality."""
    vision, weight = model.config.vision, model.encoder.patches.weight
    sized = get_modality(name).with_encoder(patches=vision.patches, prefix_tokens=vision.prefix)
    shape = (0, vision.prefix + sized.tokens, vision.width)
    return torch.zeros(shape, dtype=weight.dtype, device=get_device(model.llm))


def _check_value(
    model: OneLLMForConditionalGeneration, name: str, value: torch.Tensor | None
) -> torch.Tensor:
    """[n, *value_shape] on the model's device; n = 0 for None."""
    shape = get_modality(name).value_shape
    device = get_device(model.llm)
    if value is None:
        return torch.zeros((0, *shape), dtype=torch.float32, device=device)
    if tuple(value.shape[1:]) != tuple(shape):
        raise OneLLMError(
            f"{name} values have shape {tuple(value.shape)}",
            f"the model reads [n, {', '.join(map(str, shape))}].",
            "use the modality's own transform (OneLLMProcessor does).",
        )
    return make_input(name, value.to(device))


def _encode_visual(
    model: OneLLMForConditionalGeneration, values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All frames of all visual modalities through the encoder; the frames of a value are averaged.

    [n_m, (F,) 3, image, image] -> [n_m, P + patches, D].
    """
    names = model.config.visual_modalities
    if not names:
        return {}
    frames = torch.cat(
        [
            values[name].reshape(-1 if len(values[name]) else 0, *values[name].shape[-3:])
            for name in names
        ]
    )
    trains = has_trainable(model.encoder)
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        x = model.encoder.encode_images(model.encoder.normalise_frames(frames))
    counts = [len(values[name]) for name in names]
    frame_counts = [get_modality(name).frames for name in names]
    parts = x.split([n * frames for n, frames in zip(counts, frame_counts, strict=True)])
    return {
        name: part.reshape(n, frames, *x.shape[1:]).mean(1)
        for name, part, n, frames in zip(names, parts, counts, frame_counts, strict=True)
    }


def _encode_tokenized(
    model: OneLLMForConditionalGeneration, values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All other modalities through their tokenizers, then as one pack through the same encoder.

    [n_m, *value_shape] -> [n_m, P + L_m, D], with gradient.
    """
    names = model.config.tokenizer_modalities
    if not names:
        return {}
    tokens: list[torch.Tensor] = [
        model.tokenizers[name](values[name], model.encoder.prepend_prefix) for name in names
    ]
    lengths = [t.shape[1] for t in tokens for _ in range(len(t))]
    device = tokens[0].device  # tokenizers may be on several (`device_map`)
    flat = torch.cat([t.reshape(t.shape[0] * t.shape[1], t.shape[2]).to(device) for t in tokens])
    x = model.encoder(flat, SequenceLengths.from_lengths(lengths, device=flat.device))
    parts = x.split([t.shape[0] * t.shape[1] for t in tokens])
    return {name: part.reshape(t.shape) for name, part, t in zip(names, parts, tokens, strict=True)}


def _run_upm(
    model: OneLLMForConditionalGeneration,
    inputs: Sequence[torch.Tensor],
    router_weights: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """[n_m, Q + L_m, D] of every modality -> [sum of n_m * Q, D]."""
    lengths = tuple(x.shape[1] for x in inputs for _ in range(len(x)))
    device = inputs[0].device  # projectors may be on several (`device_map`)
    flat = torch.cat([x.reshape(x.shape[0] * x.shape[1], x.shape[2]).to(device) for x in inputs])
    weights = zip(inputs, router_weights.values(), strict=True)
    rows = torch.cat([w.repeat(len(x), 1).to(device) for x, w in weights])
    mixed: torch.Tensor = model.upm(flat, rows, lengths, QUERY_TOKENS)
    return mixed
