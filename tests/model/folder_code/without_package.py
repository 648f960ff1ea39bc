"""Run as a script: a saved model where onellm_dist cannot be imported, by its own code."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class Refuses(MetaPathFinder):
    """Stands for a machine where the package is not installed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] == "onellm_dist":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

    given = torch.load(folder / "given.pt")
    processor: Any = AutoProcessor.from_pretrained(folder / "model", trust_remote_code=True)
    load: Any = AutoModelForImageTextToText.from_pretrained
    model = load(folder / "model", trust_remote_code=True)
    found: dict[str, Any] = {"logits": model(**given["inputs"]).logits}
    for name, file in given["files"].items():
        inputs = processor(text="What is it?", **{name: file})
        found[name] = model.generate(**inputs, max_new_tokens=8)
    model.save_pretrained(folder / "again")
    processor.save_pretrained(folder / "again")
    load = AutoModelForMultimodalLM.from_pretrained
    again = load(folder / "again", trust_remote_code=True)
    found["again"] = again(**given["inputs"]).logits
    found["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuses())
    main(Path(sys.argv[1]))
