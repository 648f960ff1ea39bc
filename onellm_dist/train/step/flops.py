"""Model FLOPs of a step, for MFU (model FLOPs utilisation).

There are several conventions. This one leaves out attention scores and recomputation:

    LLM      2 N per position forward, 2 N for the gradient of the activations in the layers that it
             passes through, 2 N for the gradient of the weights that train
    head     the same x width x vocabulary, per supervised token only
    encoder  the same per token of the visual pack and of the tokenizer pack
    UPM      the same per token, all experts; the last block computes keys and values of all tokens,
             and the rest for the queries alone

N counts the weights of the part's linear layers, adapters included, without embedding and head. In
`align` that is 4 N in the LLM, 6 N in the UPM, 2 N (visual) or 4 N (tokenizers, through which the
gradient passes) in the encoder; in `tune` 6 N in the LLM and 2 N elsewhere. With `train.loss: dpo`
positions are those of both answers, and the reference adds 2 N in the LLM and its head, and in
encoder and UPM where it encodes media otherwise than the model. Projections and tokenizers (a few
per cent) are left out. MFU = FLOPs / seconds / (ranks x peak of the device in bf16, dense).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onellm_dist.data.corpus import Corpus
from onellm_dist.data.micro_batch import StepPlan
from onellm_dist.modalities import QUERY_TOKENS

PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}
"""Dense bf16 FLOP/s by a part of the device's name (vendors' data sheets; SXM variants)."""


@dataclass(frozen=True)
class StepWork:
    """What all ranks process together in a step."""

    samples: int
    """Samples of the global batch."""
    global_valid_tokens: int
    """Supervised tokens of the plan, at least 1; the summed loss is divided by it."""
    tokens: int
    """LLM positions, media spans included."""
    padding_fraction: float
    """Share of positions that belong to no sample (empty micro-batches)."""
    flops: float
    """Model FLOPs."""
    balance: float = 1.0
    """Predicted cost of the most expensive micro-batch divided by the mean."""


class FlopCounter:
    """Computes the work of a step from its plan alone, so that no rank has to ask another.

    Args:
        model: the model before the engine shards it; `requires_grad` says what trains.
        corpus: the datasets of the run.
    """

    def __init__(self, model: Any, corpus: Corpus) -> None:
        parts = {
            name: _count_matrix_weights(model.get_submodule(name))
            for name in ("encoder", "upm", "llm")
        }
        text = model.config.text_config
        self._head = text.hidden_size * text.vocab_size
        body = parts["llm"] - self._head
        encoder_trains = _trains(model.encoder)
        feeds_upm = encoder_trains or _trains(model.tokenizers) or _trains(model.projectors)
        visual = _count_per_weight(model.encoder, has_gradient=False)
        tokenized = _count_per_weight(model.encoder, has_gradient=_trains(model.tokenizers))
        upm_factor = _count_per_weight(model.upm, has_gradient=feeds_upm)
        head = model.get_output_embeddings()
        feeds_llm = feeds_upm or _trains(model.upm)
        again = 2 * (model.preference is not None)
        self._llm_factor = again + _count_per_weight(
            model.llm, has_gradient=feeds_llm, without=head
        )
        self._head_factor = again + _count_per_weight(
            head, has_gradient=feeds_llm or _trains(model.llm)
        )
        if again and not model.preference.shares_media:
            visual, tokenized, upm_factor = visual + 2, tokenized + 2, upm_factor + 2
        self._llm = self._llm_factor * body
        upm = model.config.upm
        last_kv = upm.experts * 2 * model.config.vision.width**2
        last = parts["upm"] / upm.blocks
        upm_flops = {
            name: (parts["upm"] - last + last_kv) * modality.upm_tokens
            + (last - last_kv) * QUERY_TOKENS
            for name, modality in corpus.modalities.items()
        }
        per_sample = {
            name: modality.encoder_tokens
            * parts["encoder"]
            * (visual if modality.visual else tokenized)
            + upm_flops[name] * upm_factor
            for name, modality in corpus.modalities.items()
        }
        self._per_span = per_sample
        self._by_combination = {
            "+".join(spans) or "text": sum(per_sample[name] for name in spans)
            for spans in corpus.spans
        }
        self._media = [
            0 if varied else sum(per_sample[name] for name in spans)
            for spans, varied in zip(corpus.spans, corpus.media.varied, strict=True)
        ]

    def count(self, plan: StepPlan) -> StepWork:
        """Compute what all ranks process together in a step, from the totals of its plan."""
        totals = plan.totals
        media = sum(
            count * flops
            for count, flops in zip(totals.samples_by_dataset, self._media, strict=True)
        )
        media += sum(n * self._per_span[name] for name, n in totals.varied_spans.items())
        positions = totals.llm_tokens + totals.empty_micro_batches
        return StepWork(
            samples=totals.samples,
            global_valid_tokens=plan.global_valid_tokens,
            tokens=totals.llm_tokens,
            padding_fraction=totals.empty_micro_batches / max(1, positions),
            flops=float(
                media
                + self._llm * totals.llm_tokens
                + self._head_factor * self._head * totals.supervised_tokens
            ),
            balance=plan.balance,
        )

    def describe(self, world_size: int, peak: float | None) -> str:
        """The formula with the numbers of this run, for people.

        Args:
            world_size: number of ranks.
            peak: FLOP/s of a device; None where it is not known.
        """
        peak_total = (
            f"{world_size} x {peak / 1e12:g} TFLOP/s"
            if peak
            else "ranks x peak (not known for this device: MFU is null)"
        )
        media = ", ".join(f"{name} {flops:.3g}" for name, flops in self._by_combination.items())
        head = self._head_factor * self._head
        return (
            f"MFU = model FLOPs per second / ({peak_total}); model FLOPs = {self._llm:.3g} per LLM "
            f"position ({self._llm_factor:.3g} N), {head:.3g} per supervised "
            f"token (head), and per sample {media} in encoder and UPM; attention scores, "
            "projections and recomputation are not counted"
        )


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, or None where it is not known (a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def _count_matrix_weights(module: nn.Module) -> int:
    """Number of weights that every token is multiplied with: those of the linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _count_per_weight(
    module: nn.Module, *, has_gradient: bool, without: nn.Module | None = None
) -> float:
    """FLOPs of forward and backward for each weight of a part's linear layers and token: 2 to 6.

    Args:
        module: the part.
        has_gradient: whether its inputs have a gradient.
        without: a layer of it that does not count.
    """
    total, passed, trained = 0, 0, 0
    for own in module.modules():
        has_gradient = has_gradient or any(p.requires_grad for p in own.parameters(recurse=False))
        if isinstance(own, nn.Linear) and own is not without:
            size = own.weight.numel()
            total += size
            passed += size * has_gradient
            trained += size * own.weight.requires_grad
    return 2 + 2 * (passed + trained) / total if total else 2
