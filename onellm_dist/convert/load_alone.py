"""Run by `python -c`: load a model's folder as a machine does that does not have this package.

Imports of the package are refused, so the folder's own code is what runs. Prints `loaded` and the
number of new tokens, or ends with the error.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_PACKAGE = "onellm_dist"


class _Refuses(MetaPathFinder):
    """Stands for a machine where the package is not installed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] == _PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(folder: str) -> int:
    """Load config, processor and model by the Auto classes, and generate two tokens.

    Args:
        folder: the model's folder.

    Returns:
        The number of new tokens.
    """
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    build: Any = AutoModelForMultimodalLM.from_pretrained
    model = build(folder, trust_remote_code=True)
    inputs = processor(text="Describe the input.")
    answer = model.generate(**inputs, max_new_tokens=2)
    return int(answer.shape[1] - inputs["input_ids"].shape[1])


if __name__ == "__main__":
    sys.meta_path.insert(0, _Refuses())
    print(f"loaded {load(sys.argv[1])}")
