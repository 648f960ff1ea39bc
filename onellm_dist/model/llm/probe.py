"""Comparing a small copy of an LLM, in every way in which it is run, with its own forward alone.

The reference is the LLM's eager forward of the ids of each sample, one at a time, in fp32 on the
CPU. Weights are random and large enough that whatever reaches a token moves its logits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.utils import logging

from onellm_dist.model.llm.attention import ATTENTION_NAME
from onellm_dist.model.llm.call import LLMSupport, Packing, run_packed, run_padded, split_prompts
from onellm_dist.model.llm.faults import raise_machine_fault
from onellm_dist.model.llm.per_layer import MEDIA, give_token_ids
from onellm_dist.model.llm.positions import find_spare_positions, get_positions
from onellm_dist.model.llm.reduction import POSITIONS
from onellm_dist.model.llm.rope import set_lengths, split_rope

TOLERANCE = 2e-4
"""Largest |difference| over largest |value| of logits that counts as rounding."""
GRADIENT_TOLERANCE = 2e-3
"""Largest |difference| over largest |value| of a parameter's gradient that counts as rounding."""
GAINS = (1.5, 0.5, 0.2)
"""Factors on the random weights, tried in this order: too large ones let a token attend to one
other alone, and what leaks from others would not show."""
INFLUENCE = 0.01
"""How much the token before a token should move its logits, relative to the largest."""
LEAST_INFLUENCE = 0.002
"""The least with which a leak would still be seen: ten times what counts as rounding."""
LENGTHS = (17, 5, 12)
"""Lengths of the samples: beyond, within and around the reduced windows and limits."""
NEW_TOKENS = 3
"""Tokens that are generated; with them the short sample stays below every reduced limit."""
_POOL = 1_000_003
"""Random values that all weights are made of; a prime, so that no two rows are alike."""
CANDIDATES: tuple[tuple[str, Packing], ...] = (
    (ATTENTION_NAME, "varlen"),
    (ATTENTION_NAME, "rows"),
    ("sdpa", "rows"),
    ("eager", "rows"),
)
"""Ways to run an LLM, the fastest first."""


class ProbeError(Exception):
    """What a probe found to differ."""


@contextmanager
def own_context() -> Iterator[None]:
    """Run on the CPU in fp32, whatever the caller has set, and leave no trace in its state."""
    dtype = torch.get_default_dtype()
    level = logging.get_verbosity()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        logging.set_verbosity_error()
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            logging.set_verbosity(level)


def build_llm(config: Any, attention: str, gain: float) -> Any:
    """A causal LM of a config, with the same random weights each time.

    Args:
        config: the reduced config.
        attention: `attn_implementation` of transformers.
        gain: factor on all matrices.
    """
    config = type(config).from_dict(config.to_dict())
    with no_init_weights():
        llm: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, trust_remote_code=False
        )
    llm.tie_weights()
    filled: dict[int, nn.Parameter] = {}
    for module in llm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:  # inside accelerate's empty weights
                if id(parameter) not in filled:
                    filled[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
                module._parameters[name] = filled[id(parameter)]
    split_rope(llm)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(llm.named_parameters()):
            parameter.copy_(_draw(name, parameter, pool.roll(-7919 * number), gain))
    return llm.float().eval().requires_grad_(True)


def _draw(name: str, parameter: torch.Tensor, pool: torch.Tensor, gain: float) -> torch.Tensor:
    """Random values of a parameter, from a pool of normal ones: drawing all would take seconds."""
    count = parameter.numel()
    values = pool.repeat(-(-count // len(pool)))[:count].reshape(parameter.shape)
    if parameter.dim() > 1:
        wide = "embed" in name or "wte" in name
        return gain * values * (1.0 if wide else 1 / math.sqrt(parameter[0].numel()))
    scaled = 0.2 * values
    return scaled + 1 if "norm" in name.lower() or "ln_" in name else scaled


class Reference:
    """An LLM's own eager forward of each sample alone, with gradients.

    Args:
        config: the reduced config.

    Raises:
        ProbeError: a token sees later ones, or logits are not finite.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(1)
        influences: dict[float, float] = {}
        for self.gain in GAINS:
            self.llm = build_llm(config, "eager", self.gain)
            self.vocabulary = self.llm.get_input_embeddings().weight.shape[0]
            self.samples = [
                torch.randint(1, self.vocabulary, (n,), generator=torch.Generator().manual_seed(n))
                for n in LENGTHS
            ]
            influences[self.gain] = self._compute_influence()
            if influences[self.gain] >= INFLUENCE:
                break
        else:
            self.gain = max(GAINS, key=lambda gain: influences[gain])
            if influences[self.gain] < LEAST_INFLUENCE:
                raise ProbeError("no token depends visibly on the one before it")
            self.llm = build_llm(config, "eager", self.gain)
        self.logits = [self.run(ids) for ids in self.samples]
        self.factors = [torch.randn(logits.shape, generator=generator) for logits in self.logits]
        loss = sum((a * b).sum() for a, b in zip(self.logits, self.factors, strict=True))
        self.gradients = compute_gradients(self.llm, loss)
        if not all(logits.isfinite().all() for logits in self.logits):
            raise ProbeError("its logits are not finite")
        self._check_causality()

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of one sample alone: [S] -> [S, V]."""
        logits: torch.Tensor = self.llm(input_ids=ids[None], use_cache=False).logits[0]
        if len(logits) != len(ids):
            raise ProbeError(f"it gives logits of {len(logits)} positions for {len(ids)} tokens")
        return logits

    @torch.no_grad()
    def _compute_influence(self) -> float:
        """How much the last logits move with the token before the last."""
        last = [self.run(ids)[-1] for ids in (self.samples[0], self._change(-2))]
        return differ(last[1], last[0])

    def _change(self, place: int) -> torch.Tensor:
        """The first sample with another token at one place."""
        ids = self.samples[0].clone()
        ids[place] = ids[place] % (self.vocabulary - 1) + 1
        return ids

    def _check_causality(self) -> None:
        with torch.no_grad():
            after = self.run(self._change(-1))
        if differ(after[:-1], self.logits[0][:-1]) > TOLERANCE:
            raise ProbeError("a token sees the tokens after it (no causal mask)")


def compute_gradients(llm: Any, loss: Any) -> dict[str, torch.Tensor]:
    """Gradient of every parameter; those that the loss does not depend on are left out."""
    names, parameters = zip(*llm.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def differ(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Max |difference| / max |reference|; infinite where shapes differ."""
    if ours.shape != reference.shape:
        return math.inf
    difference = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
    return float(difference) if difference.isfinite() else math.inf


def probe_packed(reference: Reference, llm: Any, support: LLMSupport) -> None:
    """Compare a pack of all samples with each sample alone.

    Raises:
        ProbeError: logits or gradients differ.
    """
    ids = torch.cat(reference.samples)
    logits = _run_pack(llm, support, llm.get_input_embeddings()(ids), ids)
    if logits.shape[0] != len(ids):
        raise ProbeError(f"a pack gives logits of {logits.shape[0]} positions for {len(ids)}")
    for number, (ours, alone) in enumerate(
        zip(logits.split(LENGTHS), reference.logits, strict=True)
    ):
        if (off := differ(ours, alone)) > TOLERANCE:
            raise ProbeError(
                f"packed, sample {number} has other logits than alone (by {off:.1%} of the largest)"
            )
    loss = (logits * torch.cat(reference.factors)).sum()
    gradients = compute_gradients(llm, loss)
    largest = max(float(g.abs().max()) for g in reference.gradients.values())
    for name, expected in reference.gradients.items():
        ours = gradients.get(name, torch.zeros_like(expected))
        off = float((ours - expected).abs().max()) / max(
            float(expected.abs().max()), 1e-3 * largest
        )
        if not off <= GRADIENT_TOLERANCE:
            raise ProbeError(f"packed, the gradient of {name} is another than alone ({off:.1%})")


def _run_pack(
    llm: Any, support: LLMSupport, embeds: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return run_packed(
        llm,
        support,
        embeds,
        token_ids=ids,
        lengths=LENGTHS,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
        places=torch.arange(len(ids)),
    )


@torch.no_grad()
def probe_media(reference: Reference, llm: Any, support: LLMSupport) -> None:
    """Compare a pack whose samples contain embeddings of no token with each sample alone.

    Raises:
        ProbeError: logits differ.
    """
    ids = torch.cat(reference.samples)
    embeds = llm.get_input_embeddings()(ids)
    media = torch.cat([(torch.arange(n) > 0) & (torch.arange(n) < 4) for n in LENGTHS])
    embeds = torch.where(media[:, None], 0.7 * embeds.roll(5, 0) + 0.1 * embeds, embeds)
    ids = torch.where(media, MEDIA, ids)
    logits = _run_pack(llm, support, embeds.clone(), ids)  # CTRL scales its input in place
    for ours, part, tokens in zip(*(x.split(LENGTHS) for x in (logits, embeds, ids)), strict=True):
        with give_token_ids(reference.llm, tokens[None]):
            alone = reference.llm(inputs_embeds=part[None], use_cache=False).logits[0]
        if (off := differ(ours, alone)) > TOLERANCE:
            raise ProbeError(f"packed with media, a sample has other logits than alone ({off:.1%})")


def pad(reference: Reference, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] ids and mask of all samples, padded with token 0 on one side."""
    longest = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(reference.samples):
        at = slice(longest - len(sample), longest) if left else slice(0, len(sample))
        ids[row, at], mask[row, at] = sample, 1
    return ids, mask


def probe_padded(reference: Reference, llm: Any, support: LLMSupport) -> None:
    """Compare padded batches with each sample alone.

    Raises:
        ProbeError: logits differ.
    """
    for left in (True, False):
        ids, mask = pad(reference, left)
        with torch.no_grad():
            logits = run_padded(
                llm,
                support,
                llm.get_input_embeddings()(ids),
                token_ids=ids,
                mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            )
        for row, alone in enumerate(reference.logits):
            if (off := differ(logits[row][mask[row] == 1], alone)) > TOLERANCE:
                side = "left" if left else "right"
                raise ProbeError(
                    f"padded on the {side}, a text has other logits than alone ({off:.1%})"
                )


def probe_generation(reference: Reference, llm: Any, support: LLMSupport) -> None:
    """Compare generation after padded prompts with forwards of each text so far, alone.

    Raises:
        ProbeError: logits differ.
    """
    ids, mask = pad(reference, left=True)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    llm.generation_config = GenerationConfig()
    set_lengths(llm, None)
    sequences: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        embedded = llm.get_input_embeddings()(ids)
        for embeds, tokens, real in split_prompts(support, embedded, ids, mask):
            with give_token_ids(llm, tokens):
                out = llm.generate(
                    inputs_embeds=embeds, attention_mask=real, generation_config=config
                )
            sequences += list(out.sequences)
            logits += list(torch.stack(out.logits, 1))
        for sample, new, ours in zip(reference.samples, sequences, logits, strict=True):
            expected = reference.run(torch.cat([sample, new]))[len(sample) - 1 : -1]
            if (off := differ(ours, expected)) > TOLERANCE:
                raise ProbeError(f"generated tokens have other logits than alone ({off:.1%})")


def find_support(reference: Reference) -> LLMSupport | str:
    """The first of CANDIDATES that gives what the reference gives, or what differs in each."""
    found: list[str] = []
    for attention, packing in CANDIDATES:
        try:
            llm = build_llm(reference.config, attention, reference.gain)
        except Exception as error:  # the class does not know this attention
            raise_machine_fault(error)
            found.append(f"{packing} with {attention}: {describe(error)}")
            continue
        support = LLMSupport(attention, packing)
        difference = find_difference(probe_packed, reference, llm, support) or find_difference(
            probe_media, reference, llm, support
        )
        if difference is not None:
            found.append(f"{packing} with {attention}: {difference}")
            continue
        alone = replace(support, padding=False)
        padded = find_difference(probe_padded, reference, llm, support)
        if padded is not None and find_difference(probe_padded, reference, llm, alone):
            found.append(f"{packing} with {attention}: {padded}")
            continue
        if padded or find_difference(probe_generation, reference, llm, support):
            generates = find_difference(probe_generation, reference, llm, alone) is None
            support = alone if padded or generates else support
            support = replace(support, generation=generates)
        positions = get_positions(reference.config)
        if positions is None or positions > 2 * POSITIONS:  # the copy's are fewer where it has any
            return support
        spare = find_spare_positions(positions, partial(takes_length, reference))
        return replace(support, spare_positions=spare)
    return "; ".join(found)


def takes_length(reference: Reference, length: int) -> bool:
    """Whether an LLM can be run on a number of tokens."""
    try:
        with torch.no_grad():
            reference.run(torch.ones(length, dtype=torch.int64))
    except Exception as error:  # IndexError, RuntimeError, ...: it has no such position
        raise_machine_fault(error)
        return False
    return True


def find_difference(probe: Callable[..., None], *args: Any) -> str | None:
    """Run a probe; what it found, or None.

    An exception of the LLM's code is a finding too: it could not be run in this way.
    """
    try:
        probe(*args)
    except Exception as error:  # whatever transformers' code raises
        raise_machine_fault(error)
        return describe(error)
    return None


def describe(error: Exception) -> str:
    """One line about an exception."""
    if isinstance(error, ProbeError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
