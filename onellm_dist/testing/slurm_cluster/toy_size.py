"""A recipe brought down to toy size: the keys that change, and the toy data it reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import get_staged_path
from onellm_dist.config.load import load_config

TOY_RECIPE = Path("toy/align_image")
STEPS = 12
CHECKPOINT_EVERY = 4
SAMPLES = 64
"""Training samples of each toy dataset."""


def make_toy_overrides(
    recipe: Path, overrides: Sequence[str], *, ranks: int, data: Path
) -> list[str]:
    """Make the key=value that bring a recipe down to seconds per step on two CPU cores.

    The model, the data and the numbers of samples and steps become small. The stage, the schedule
    and everything else stay the recipe's own.

    Args:
        recipe: a recipe file, or the name of one that ships.
        overrides: key=value of the user; they are applied last.
        ranks: number of ranks.
        data: folder of the toy datasets.

    Raises:
        UsageError: the recipe or an override is wrong.
    """
    toy = load_config(TOY_RECIPE)
    mixture = ", ".join(
        f"{{path: {entry.path}, weight: {entry.weight}}}" for entry in toy.data.mixture
    )
    values = {
        "model.preset": "toy",
        "data.root": data.resolve(),
        "data.mixture": f"[{mixture}]",
        "data.global_batch": 2 * ranks,
        "model.init_from_image": "[]",
        "data.workers": 1,
        "data.pack_llm_tokens": toy.data.pack_llm_tokens,
        "data.pack_encoder_tokens": toy.data.pack_encoder_tokens,
        "data.validation": "",
        "train.steps": STEPS,
        "train.precision": "fp32",
        "train.log_every": 1,
        "checkpoint.every": CHECKPOINT_EVERY,
        "checkpoint.keep": 2,
        "engine.config": toy.engine.config,
    }
    found = [*(f"{key}={value}" for key, value in values.items()), *overrides]
    load_config(recipe, found)
    return found


def build_toy_data(recipe: Path, overrides: Sequence[str], folder: Path) -> None:
    """Build the toy datasets of the mixture, unless they are there.

    Data that an override names is the user's; then nothing is built.

    Args:
        recipe: the recipe.
        overrides: the result of `make_toy_overrides`.
        folder: folder of the toy datasets.

    Raises:
        OneLLMError: the datasets cannot be built.
    """
    config = load_config(recipe, overrides)
    if config.data.root != folder.resolve() or folder.is_dir():
        return
    names = ",".join(str(entry.path) for entry in config.data.mixture)
    staged = get_staged_path(folder)  # an interrupted build must not be mistaken for a complete one
    shutil.rmtree(staged, ignore_errors=True)
    command = [sys.executable, "-m", "onellm_dist.cli", "shards", "build", "toyworld", str(staged)]
    command += ["-o", f"train={SAMPLES}", "-o", "test=1", "-o", f"modalities={names}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OneLLMError(
            f"the toy data could not be built: {done.stderr.strip()}",
            "the rehearsal has nothing to read.",
            "fix what it names.",
        )
    staged.rename(folder)
