"""Pretrains the stand-in towers and puts them into a OneLLM directory, which the recipes take as `model.path`.

python -m onellm_dist.testing.demo.toy_towers clip OUT.pt [key=value ...]      keys of ClipRecipe
python -m onellm_dist.testing.demo.toy_towers llm OUT.pt [key=value ...]       keys of LLMRecipe
python -m onellm_dist.testing.demo.toy_towers assemble CLIP.pt LLM.pt OUT
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import LlamaForCausalLM

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.model.presets import load_model
from onellm_dist.testing.demo.toy_clip import (
    ClipRecipe,
    ImageBank,
    pretrain_clip,
    steps_of,
    top1,
    zero_shot,
)
from onellm_dist.testing.demo.toy_llm import LLMRecipe, composition_score, pretrain_llm

PRESET = "toy"
LEAST_TOP1 = 0.95
"""With a weak CLIP (0.75) align never learned shapes; with this it did."""
LEAST_COMPOSITION = 0.9

Recipe = TypeVar("Recipe", ClipRecipe, LLMRecipe)


def make_clip(out: Path, recipe: ClipRecipe) -> dict[str, Any]:
    """Pretrain the encoder; writes its state dict to `out` and what was reached to `out` with the suffix .json.

    Raises:
        OneLLMError: it does not tell hard batches apart: align would not learn from it.
    """
    model, processor = load_model(path=None, preset=PRESET, seed=recipe.seed)
    with progress(recipe.bank, "Stand-in CLIP: rendering", unit="images") as bar:
        bank = ImageBank("pretrain", recipe.bank, recipe.seed, lambda done: bar.advance())
    losses: list[float] = []
    with progress(steps_of(recipe), "Stand-in CLIP", unit="steps") as bar:

        def tell(step: int, loss: float) -> None:
            losses.append(loss)
            bar.note(f"loss {loss:.3f}")
            bar.advance()

        head, _ = pretrain_clip(model.encoder, processor.tokenizer, recipe, bank, tell)
    fresh = ImageBank("pretrain", 1000, recipe.seed + 1)
    held_out = ImageBank("test_held_out", 240, recipe.seed + 1)
    told_apart = top1(model.encoder, head, processor.tokenizer, fresh)
    reached = {
        "images": steps_of(recipe) * recipe.batch,
        "top1_hard_batches": told_apart,
        "zero_shot_held_out": zero_shot(model.encoder, head, processor.tokenizer, held_out),
        "loss": losses,
    }
    _write(out, model.encoder.state_dict(), reached)
    if told_apart < LEAST_TOP1:
        raise OneLLMError(
            f"the stand-in CLIP reached a top-1 of {told_apart:.2f} on hard batches, less than {LEAST_TOP1}",
            "align learns no shapes from a weak encoder.",
            "give it more images (images=...).",
        )
    return reached


def make_llm(out: Path, recipe: LLMRecipe) -> dict[str, Any]:
    """Pretrain the LLM; writes its state dict to `out` and what was reached to `out` with the suffix .json.

    Raises:
        OneLLMError: it does not write captions from attribute words: modality tokens could not steer it.
    """
    model, processor = load_model(path=None, preset=PRESET, seed=recipe.seed)
    text_config: Any = model.config.text_config
    llm: Any = LlamaForCausalLM(text_config)
    llm.load_state_dict(model.llm.state_dict())
    with progress(recipe.steps, "Stand-in LLM", unit="steps") as bar:

        def tell(step: int, loss: float) -> None:
            bar.note(f"loss {loss:.3f}")
            bar.advance()

        losses = pretrain_llm(llm, processor.tokenizer, recipe, tell)
    composed = composition_score(llm, processor.tokenizer)
    reached = {
        "documents": recipe.steps * recipe.batch,
        "held_out_from_words": composed,
        "loss": losses,
    }
    _write(out, llm.state_dict(), reached)
    if composed < LEAST_COMPOSITION:
        raise OneLLMError(
            f"the stand-in LLM writes {composed:.2f} of the held-out captions from their words, less than {LEAST_COMPOSITION}",
            "modality tokens could not steer it.",
            "give it more steps (steps=...).",
        )
    return reached


def assemble(clip: Path, llm: Path, out: Path) -> None:
    """A OneLLM directory of the toy preset with these towers; everything between them is random (seed 0)."""
    model, processor = load_model(path=None, preset=PRESET, seed=0)
    model.encoder.load_state_dict(torch.load(clip, weights_only=True))
    model.llm.load_state_dict(torch.load(llm, weights_only=True))
    model.save_pretrained(out)
    processor.save_pretrained(out)


def reached_by(weights: Path) -> dict[str, Any]:
    """What `make_clip` or `make_llm` wrote beside its weights."""
    return dict(json.loads(weights.with_suffix(".json").read_text(encoding="utf-8")))


def _write(out: Path, state: dict[str, torch.Tensor], reached: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, out)
    out.with_suffix(".json").write_text(json.dumps(reached), encoding="utf-8")


def _recipe(default: Recipe, overrides: Sequence[str]) -> Recipe:
    known = {f.name for f in dataclasses.fields(default)}
    values = {}
    for item in overrides:
        key, _, text = item.partition("=")
        if key not in known:
            raise UsageError(
                f"unknown key {key!r}",
                "nothing was started.",
                f"use any of: {', '.join(sorted(known))}.",
            )
        values[key] = yaml.safe_load(text)
    return dataclasses.replace(default, **values)


def main(arguments: Sequence[str]) -> int:
    """The command line; see the module's first lines."""
    try:
        match arguments:
            case ["clip", out, *overrides]:
                print(_short(make_clip(Path(out), _recipe(ClipRecipe(), overrides))))
            case ["llm", out, *overrides]:
                print(_short(make_llm(Path(out), _recipe(LLMRecipe(), overrides))))
            case ["assemble", clip, llm, out]:
                assemble(Path(clip), Path(llm), Path(out))
            case _:
                raise UsageError(
                    f"cannot read the arguments {' '.join(arguments)!r}",
                    "nothing was started.",
                    (__doc__ or "").strip(),
                )
    except OneLLMError as error:
        print(f"onellm: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _short(reached: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.3g}" for key, value in reached.items() if not isinstance(value, list)
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
