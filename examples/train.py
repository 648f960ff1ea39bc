"""Train a recipe in your own process.

    python examples/train.py toy runs/example

`fit` returns, and the process continues. With more steps, the same run resumes from its latest
checkpoint.
"""

from __future__ import annotations

import sys

from onellm_dist import Trainer, load_config


def main(root: str, run_dir: str) -> None:
    """Train the toy model for three steps."""
    overrides = [
        f"data.root={root}",
        f"run.dir={run_dir}",
        "data.global_batch=8",
        "train.steps=3",
    ]
    config = load_config("toy/align_image", overrides)
    outcome = Trainer.from_config(config).fit()
    print(f"{outcome.status}: {outcome.reason}; the model is in {config.run.dir / 'model'}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
