"""Pretrains the toy towers and assembles a OneLLM directory, which recipes take as `model.path`.

python -m onellm_dist.testing.demo.toy_towers clip OUT.pt [key=value ...]   keys of ClipPretraining
python -m onellm_dist.testing.demo.toy_towers llm OUT.pt [key=value ...]    keys of LLMPretraining
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

from onellm_dist.common.errors import EXIT_DONE, OneLLMError, UsageError
from onellm_dist.common.output import write_error, write_output
from onellm_dist.common.progress import progress
from onellm_dist.model.presets import load_model
from onellm_dist.testing.demo.toy_clip import (
    ClipPretraining,
    ImageBank,
    measure_top1,
    measure_zero_shot,
    pretrain_clip,
)
from onellm_dist.testing.demo.toy_llm import LLMPretraining, pretrain_llm, score_composition

PRESET = "toy"
LEAST_TOP1 = 0.95
"""With a weak CLIP (0.75) align never learned shapes; with this one it did."""
LEAST_COMPOSITION = 0.9
ANY_QUALITY = "--any-quality"
"""Accept towers from which nothing can be learned; for tests of what follows."""

Pretraining = TypeVar("Pretraining")


def make_clip(out: Path, recipe: ClipPretraining, least_top1: float = LEAST_TOP1) -> dict[str, Any]:
    """Pretrain the encoder.

    Args:
        out: file for its state dict; the results are written beside it with the suffix .json.
        recipe: how it is pretrained.
        least_top1: what it must reach on hard batches.

    Returns:
        The results.

    Raises:
        OneLLMError: it does not tell the images of hard batches apart, so align would not learn.
    """
    model, processor = load_model(path=None, preset=PRESET, seed=recipe.seed)
    with progress(recipe.bank, "Toy CLIP: rendering", unit="images") as bar:
        bank = ImageBank("pretrain", recipe.bank, recipe.seed, lambda done: bar.advance())
    with progress(recipe.steps, "Toy CLIP", unit="steps") as bar:

        def show(step: int, loss: float) -> None:
            bar.note(f"loss {loss:.3f}")
            bar.advance()

        head, losses = pretrain_clip(model.encoder, processor.tokenizer, recipe, bank, show)
    fresh = ImageBank("pretrain", 1000, recipe.seed + 1)
    held_out = ImageBank("test_held_out", 240, recipe.seed + 1)
    top1 = measure_top1(model.encoder, head, processor.tokenizer, fresh)
    results = {
        "images": recipe.steps * recipe.batch,
        "top1_hard_batches": top1,
        "zero_shot_held_out": measure_zero_shot(model.encoder, head, processor.tokenizer, held_out),
        "loss": losses,
    }
    _write_tower(out, model.encoder.state_dict(), results)
    if top1 < least_top1:
        raise OneLLMError(
            f"the toy CLIP reached a top-1 of {top1:.2f} on hard batches; {least_top1} is needed",
            "align learns no shapes from a weak encoder.",
            "pretrain it on more images (images=...).",
        )
    return results


def make_llm(
    out: Path, recipe: LLMPretraining, least_composition: float = LEAST_COMPOSITION
) -> dict[str, Any]:
    """Pretrain the LLM.

    Args:
        out: file for its state dict; the results are written beside it with the suffix .json.
        recipe: how it is pretrained.
        least_composition: share of the held-out captions that it must write.

    Returns:
        The results.

    Raises:
        OneLLMError: it does not write captions from attribute words, so modality tokens could not
            steer it.
    """
    model, processor = load_model(path=None, preset=PRESET, seed=recipe.seed)
    text_config: Any = model.config.text_config
    llm: Any = LlamaForCausalLM(text_config)
    llm.load_state_dict(model.llm.state_dict())
    with progress(recipe.steps, "Toy LLM", unit="steps") as bar:

        def show(step: int, loss: float) -> None:
            bar.note(f"loss {loss:.3f}")
            bar.advance()

        losses = pretrain_llm(llm, processor.tokenizer, recipe, show)
    composition = score_composition(llm, processor.tokenizer)
    results = {
        "documents": recipe.steps * recipe.batch,
        "held_out_from_words": composition,
        "loss": losses,
    }
    _write_tower(out, llm.state_dict(), results)
    if composition < least_composition:
        raise OneLLMError(
            f"the toy LLM writes {composition:.2f} of the held-out captions from their words; "
            f"{least_composition} is needed",
            "modality tokens could not steer it.",
            "pretrain it for more steps (steps=...).",
        )
    return results


def assemble(clip: Path, llm: Path, out: Path) -> None:
    """Write a OneLLM directory of the toy preset with these towers.

    Everything between the towers is random (seed 0).

    Args:
        clip: state dict of the encoder.
        llm: state dict of the LLM.
        out: the directory.
    """
    model, processor = load_model(path=None, preset=PRESET, seed=0)
    model.encoder.load_state_dict(torch.load(clip, weights_only=True))
    model.llm.load_state_dict(torch.load(llm, weights_only=True))
    model.save_pretrained(out)
    processor.save_pretrained(out)


def _write_tower(out: Path, state: dict[str, torch.Tensor], results: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, out)
    out.with_suffix(".json").write_text(json.dumps(results), encoding="utf-8")


def override(default: Pretraining, overrides: Sequence[str]) -> Pretraining:
    """Change fields by key=value, with values in YAML.

    Args:
        default: the defaults.
        overrides: key=value.

    Raises:
        UsageError: there is no field of that name.
    """
    recipe: Any = default  # a dataclass
    fields = {field.name for field in dataclasses.fields(recipe)}
    values = {}
    for item in overrides:
        key, _, text = item.partition("=")
        if key not in fields:
            raise UsageError(
                f"unknown key {key!r}",
                "nothing was started.",
                f"use any of: {', '.join(sorted(fields))}.",
            )
        values[key] = yaml.safe_load(text)
    changed: Pretraining = dataclasses.replace(recipe, **values)
    return changed


def main(arguments: Sequence[str]) -> int:
    """Run the command line that the module's docstring describes."""
    wanted = 0.0 if ANY_QUALITY in arguments else 1.0
    try:
        match [argument for argument in arguments if argument != ANY_QUALITY]:
            case ["clip", out, *overrides]:
                clip = override(ClipPretraining(), overrides)
                write_output(_format_results(make_clip(Path(out), clip, wanted * LEAST_TOP1)))
            case ["llm", out, *overrides]:
                llm_recipe = override(LLMPretraining(), overrides)
                write_output(
                    _format_results(make_llm(Path(out), llm_recipe, wanted * LEAST_COMPOSITION))
                )
            case ["assemble", clip, llm, out]:
                assemble(Path(clip), Path(llm), Path(out))
            case _:
                raise UsageError(
                    f"cannot read the arguments {' '.join(arguments)!r}",
                    "nothing was started.",
                    (__doc__ or "").strip(),
                )
    except OneLLMError as error:
        write_error(f"onellm: {error}")
        return error.exit_code
    return EXIT_DONE


def _format_results(results: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.3g}" for key, value in results.items() if not isinstance(value, list)
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
