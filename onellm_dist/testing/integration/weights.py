"""What two stages changed in the model, tensor by tensor: run as `python -m onellm_dist.testing.integration.weights ALIGNED TUNED PRESET SEED`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Reader = Callable[[str], "torch.Tensor"]


def open_tensors(folder: Path) -> dict[str, Reader]:
    """Name to a function that reads this tensor from a directory's safetensors files (one at a time in memory)."""
    from safetensors import safe_open

    found: dict[str, Reader] = {}
    for file in sorted(folder.glob("*.safetensors")):
        handle = safe_open(file, framework="pt")
        found |= dict.fromkeys(handle.keys(), handle.get_tensor)
    return found


def changed_shares(before: Mapping[str, Reader], after: Mapping[str, Reader]) -> dict[str, float]:
    """Share of the tensors of each part (the name's first component) that differ in any element.

    `before` is rounded to the precision of `after`. Raises ValueError where the names differ.
    """
    import torch

    if unlike := sorted(set(before) ^ set(after)):
        raise ValueError(f"tensors of one model only: {', '.join(unlike[:5])}")
    tally: dict[str, list[bool]] = {}
    for name, read in after.items():
        new = read(name)
        tally.setdefault(name.split(".")[0], []).append(
            not torch.equal(before[name](name).to(new.dtype), new)
        )
    return {part: sum(changed) / len(changed) for part, changed in sorted(tally.items())}


def main(aligned: Path, tuned: Path, preset: str, seed: int) -> dict[str, dict[str, float]]:
    """Shares of changed tensors by stage and part, the start being the preset's weights as align drew and loaded them."""
    from onellm_dist.model.presets import load_model

    model, _ = load_model(path=None, preset=preset, seed=seed)
    state = model.state_dict()
    after_align, after_tune = open_tensors(aligned), open_tensors(tuned)
    start: dict[str, Reader] = dict.fromkeys(after_align, state.__getitem__)
    return {
        "align": changed_shares(start, after_align),
        "tune": changed_shares(after_align, after_tune),
    }


if __name__ == "__main__":
    print(
        json.dumps(
            main(Path(sys.argv[1]), Path(sys.argv[2]), preset=sys.argv[3], seed=int(sys.argv[4]))
        )
    )
