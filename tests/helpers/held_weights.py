"""A callback that says what a rank holds of the weights."""

from __future__ import annotations

import json

from torch.distributed.tensor import DTensor

from onellm_dist import Callback


class HeldWeights(Callback):
    """Writes `held-RANK.json`: how weights that are frozen, and those that train, are held."""

    def on_fit_start(self) -> None:
        held: dict[str, list[str]] = {"frozen": [], "trained": []}
        for parameter in self.trainer.model.parameters():
            kind = "sharded" if isinstance(parameter, DTensor) else "whole"
            held["trained" if parameter.requires_grad else "frozen"].append(kind)
        found = {name: sorted(set(kinds)) for name, kinds in held.items()}
        path = self.trainer.config.run.dir / f"held-{self.trainer.dist.rank}.json"
        path.write_text(json.dumps(found))
