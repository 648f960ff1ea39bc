"""What align and tune changed in the model, tensor by tensor.

python -m onellm_dist.testing.integration.weights ALIGNED TUNED PRESET SEED
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onellm_dist.common.output import write_output

if TYPE_CHECKING:
    import torch

TensorReader = Callable[[str], "torch.Tensor"]


def open_tensors(folder: Path) -> dict[str, TensorReader]:
    """Open a folder's safetensors files: name to a function that reads this tensor into memory."""
    from safetensors import safe_open

    found: dict[str, TensorReader] = {}
    for file in sorted(folder.glob("*.safetensors")):
        handle: Any = safe_open(file, framework="pt")
        found |= dict.fromkeys(handle.keys(), handle.get_tensor)
    return found


def compute_changed_shares(
    before: Mapping[str, TensorReader], after: Mapping[str, TensorReader]
) -> dict[str, float]:
    """Share of the tensors of each part (the first component of a name) with any changed element.

    Args:
        before: tensors of the first model; each is rounded to the precision of its counterpart.
        after: tensors of the second model.

    Raises:
        ValueError: the two models have different tensors.
    """
    import torch

    if unlike := sorted(set(before) ^ set(after)):
        raise ValueError(f"tensors of one model only: {', '.join(unlike[:5])}")
    changed: dict[str, list[bool]] = {}
    for name, read in after.items():
        new = read(name)
        old = before[name](name).to(new.dtype)
        changed.setdefault(name.split(".")[0], []).append(not torch.equal(old, new))
    return {part: sum(tensors) / len(tensors) for part, tensors in sorted(changed.items())}


def compare_stages(
    aligned: Path, tuned: Path, preset: str, seed: int
) -> dict[str, dict[str, float]]:
    """Share of changed tensors by stage and part.

    Args:
        aligned: the model after align.
        tuned: the model after tune.
        preset: preset of the model before align.
        seed: seed of its random weights.
    """
    from onellm_dist.model.presets import load_model

    model, _ = load_model(path=None, preset=preset, seed=seed)
    state = model.state_dict()
    after_align, after_tune = open_tensors(aligned), open_tensors(tuned)
    start: dict[str, TensorReader] = dict.fromkeys(after_align, state.__getitem__)
    return {
        "align": compute_changed_shares(start, after_align),
        "tune": compute_changed_shares(after_align, after_tune),
    }


if __name__ == "__main__":
    shares = compare_stages(
        Path(sys.argv[1]), Path(sys.argv[2]), preset=sys.argv[3], seed=int(sys.argv[4])
    )
    write_output(json.dumps(shares))
