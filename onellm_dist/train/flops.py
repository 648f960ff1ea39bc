"""Model FLOPs of a step, for MFU. There are several conventions; this is ours, without attention scores and without recomputation:

    LLM      4 N a position where frozen (forward 2 N, gradient of the activations 2 N), 6 N where it trains
    head     4 or 6 x width x vocabulary, a supervised token only
    encoder  2 N a token of the visual pack, 4 N of the tokenizer pack (the gradient passes through)   [trainable: 6 N; tune: 2 N]
    UPM      6 N a token, all experts   [tune: 2 N]; the last block computes keys and values of all tokens, the rest of the queries alone

N counts the weights of the part's linear layers (embedding and head apart). Projections and tokenizers (a few per cent) are left out.
MFU = FLOPs / seconds / (ranks x peak of the device in bf16, dense).
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
"""Dense bf16 FLOP/s by a part of the device's name (vendors' data sheets; SXM forms)."""


@dataclass(frozen=True)
class StepSize:
    """What the ranks do together in a step."""

    samples: int
    global_valid_tokens: int
    """What the summed loss is divided by: the plan's supervised tokens, at least 1."""
    supervised_tokens: int
    tokens: int
    """LLM positions, spans of modality tokens included."""
    padding_fraction: float
    """Positions that are no sample's (dummies of ranks without a pack), of all positions."""
    flops: float
    balance: float = 1.0
    """Predicted cost of the costliest micro-batch over the mean."""


class FlopCounter:
    """Work of a step from its plan alone, so that no rank has to ask another.

    Args:
        model: the model before the engine shards it.
        stage: `align` or `tune`.
        encoder_trains: in `align`.
    """

    def __init__(
        self, model: Any, corpus: Corpus, stage: str, *, encoder_trains: bool = False
    ) -> None:
        parts = {name: _matrices(model.get_submodule(name)) for name in ("encoder", "upm", "llm")}
        text = model.config.text_config
        self._head = text.hidden_size * text.vocab_size
        body = parts["llm"] - self._head
        align = stage == "align"
        self._llm_factor = self._head_factor = 4 if align else 6
        self._llm = self._llm_factor * body
        upm = model.config.upm
        last_kv = upm.experts * 2 * model.config.vision.width**2
        last = parts["upm"] / upm.blocks
        upm_flops = {
            name: (parts["upm"] - last + last_kv) * kind.upm_tokens
            + (last - last_kv) * QUERY_TOKENS
            for name, kind in corpus.modalities.items()
        }
        encoder = dict.fromkeys(
            (True, False), 6 if encoder_trains else 2
        )  # by whether the modality is visual
        if align and not encoder_trains:
            encoder[False] = 4
        per_sample = {
            name: kind.encoder_tokens * parts["encoder"] * encoder[kind.visual]
            + upm_flops[name] * (6 if align else 2)
            for name, kind in corpus.modalities.items()
        }
        self._media = [sum(per_sample[name] for name in spans) for spans in corpus.spans]
        self._by_kind = {
            "+".join(spans) or "text": flops
            for spans, flops in zip(corpus.spans, self._media, strict=True)
        }

    def step(self, plan: StepPlan) -> StepSize:
        """Return what all ranks do together in a step, from the totals of its plan."""
        totals = plan.totals
        media = sum(
            count * flops
            for count, flops in zip(totals.samples_by_dataset, self._media, strict=True)
        )
        return StepSize(
            totals.samples,
            plan.global_valid_tokens,
            totals.supervised_tokens,
            totals.llm_tokens,
            totals.empty_micro_batches / max(1, totals.llm_tokens + totals.empty_micro_batches),
            float(
                media
                + self._llm * totals.llm_tokens
                + self._head_factor * self._head * totals.supervised_tokens
            ),
            plan.balance,
        )

    def describe(self, world: int, peak: float | None) -> str:
        """The formula with this run's figures, for people."""
        over = (
            f"{world} x {peak / 1e12:g} TFLOP/s"
            if peak
            else "ranks x peak (not known for this device: MFU is null)"
        )
        return (
            f"MFU = model FLOPs a second / ({over}); model FLOPs = {self._llm:.3g} a position of the LLM ({self._llm_factor} N), "
            f"{self._head_factor * self._head:.3g} a supervised token (head), and per sample "
            + ", ".join(f"{name} {flops:.3g}" for name, flops in self._by_kind.items())
            + " in encoder and UPM; attention scores, projections and recomputation are not counted"
        )


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, or None where it is not known (a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def _matrices(module: nn.Module) -> int:
    """Weights that every token is multiplied with: those of the linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
