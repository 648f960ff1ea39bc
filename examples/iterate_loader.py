"""What each rank reads in the first steps of a run, as packed batches.

    python examples/iterate_loader.py toy

The samples of a step do not depend on the number of ranks: only their grouping does. Pictures come
as 8-bit pixels; `make_input` normalises them as the model does.
"""

from __future__ import annotations

import sys

from onellm_dist import Loader, Plan, load_config
from onellm_dist.model import load_model
from onellm_dist.model.pixels import make_input

WORLD_SIZE = 2
STEPS = 2


def main(root: str) -> None:
    """Print the micro-batches of every rank, and the digest of each step."""
    config = load_config("toy/align_all", [f"data.root={root}", "data.global_batch=8"])
    model, processor = load_model(path=None, preset="toy", seed=0)
    plan = Plan.open(config.data, processor.tokenizer, config.run.seed, model.config.modalities)
    for rank in range(WORLD_SIZE):
        with Loader(plan, WORLD_SIZE, rank, first_step=0, last_step=STEPS, workers=1) as loader:
            for micro_batch, batch in loader:
                combinations = ["+".join(modalities) or "text" for modalities in batch.modalities]
                print(
                    f"rank {rank}, step {micro_batch.step}, micro-batch {micro_batch.index}: "
                    f"{len(batch.input_ids)} text tokens, {', '.join(combinations)}"
                )
                for name, values in batch.values.items():
                    inputs = make_input(name, values)
                    print(f"  {name}: {len(values)} of {values.dtype}, input of {inputs.dtype}")
    for step in range(STEPS):
        print(f"step {step}: {plan.digest(step)}")


if __name__ == "__main__":
    main(sys.argv[1])
