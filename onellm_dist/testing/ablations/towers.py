"""Makes what the runs of an ablation start from: the encoder without captions, and whole models.

python -m onellm_dist.testing.ablations.towers dino OUT.pt [key=value ...]   keys of DinoPretraining
python -m onellm_dist.testing.ablations.towers assemble ENCODER.pt LLM.pt SEED OUT [key=value ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from onellm_dist.common.errors import EXIT_DONE, OneLLMError, UsageError
from onellm_dist.common.output import write_error, write_output
from onellm_dist.common.progress import progress
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import build_config, load_model, load_preset_processor
from onellm_dist.testing.ablations.toy_dino import (
    DinoPretraining,
    measure_neighbours,
    pretrain_dino,
)
from onellm_dist.testing.ablations.variants import MODALITIES
from onellm_dist.testing.demo.toy_clip import ImageBank
from onellm_dist.testing.demo.toy_towers import PRESET, override

MEASURED = 1000
"""Most fresh images for the share of equal neighbours."""


def make_dino(out: Path, recipe: DinoPretraining) -> dict[str, Any]:
    """Pretrain the encoder that sees no captions.

    Args:
        out: file for its state dict; the results are written beside it with the suffix .json.
        recipe: how it is pretrained.

    Returns:
        The results.
    """
    model, _ = load_model(path=None, preset=PRESET, seed=recipe.seed)
    with progress(recipe.bank, "Toy DINO: rendering", unit="images") as bar:
        bank = ImageBank("pretrain", recipe.bank, recipe.seed, lambda done: bar.advance())
    with progress(recipe.steps, "Toy DINO", unit="steps") as bar:

        def show(step: int, loss: float) -> None:
            bar.note(f"loss {loss:.3f}")
            bar.advance()

        losses = pretrain_dino(model.encoder, recipe, bank, show)
    fresh = ImageBank("pretrain", min(MEASURED, recipe.bank), recipe.seed + 1)
    results = {
        "images": recipe.steps * recipe.batch,
        "equal_neighbours": measure_neighbours(model.encoder, fresh),
        "loss": losses,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results), encoding="utf-8")
    torch.save(model.encoder.state_dict(), out)
    return results


def assemble_variant(
    encoder: Path, llm: Path, seed: int, out: Path, upm: Mapping[str, int | str]
) -> None:
    """Write a OneLLM directory of the toy preset with these towers and another UPM.

    Args:
        encoder: state dict of the encoder.
        llm: state dict of the LLM.
        seed: of everything between the towers.
        out: the directory.
        upm: keys of the UPM's config that differ from the preset's.
    """
    preset = build_config(PRESET)
    own = {key: getattr(preset.upm, key) for key in ("experts", "blocks", "heads", "ffn")}
    own |= {"router_hidden": preset.upm.router_hidden, **upm}
    config = OneLLMConfig(
        vision=preset.vision,
        upm=OneLLMUPMConfig(**own),
        text_config=preset.text_config,
        modalities=MODALITIES,
    )
    model: Any = OneLLMForConditionalGeneration(config)
    initialise(model, seed)
    model.encoder.load_state_dict(torch.load(encoder, weights_only=True))
    model.llm.load_state_dict(torch.load(llm, weights_only=True))
    model.save_pretrained(out)
    load_preset_processor(PRESET).save_pretrained(out)


def main(arguments: Sequence[str]) -> int:
    """Run the command line that the module's docstring describes."""
    try:
        match arguments:
            case ["dino", out, *overrides]:
                results = make_dino(Path(out), override(DinoPretraining(), overrides))
                write_output(f"equal neighbours {results['equal_neighbours']:.2f}")
            case ["assemble", encoder, llm, seed, out, *upm]:
                pairs = (item.partition("=") for item in upm)
                changed = {key: yaml.safe_load(value) for key, _, value in pairs}
                assemble_variant(Path(encoder), Path(llm), int(seed), Path(out), changed)
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
