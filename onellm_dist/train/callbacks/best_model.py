"""The best weights of a run by validation loss: `<run.dir>/best`, a `save_pretrained` directory with `best.json` in it:
step, loss, sample_digest of the validation set.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.export import export_model

BEST, RECORD = "best", "best.json"


class Best:
    """Keeps the weights with the least validation loss. Every method is called by all ranks together.

    Args:
        folder: `<run.dir>/best`; what an earlier start left there goes on to count, if it was measured on the same samples.
        model: the transformers model whose weights the engine holds.
        sample_digest: of the validation set (rank 0 alone needs it).
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        model: Any,
        processor: Any,
        dist: Distributed,
        sample_digest: str,
    ) -> None:
        self._folder, self._engine, self._model, self._processor, self._dist = (
            folder,
            engine,
            model,
            processor,
            dist,
        )
        self._digest = sample_digest
        self.loss: float | None = dist.broadcast(
            _recorded(folder, sample_digest) if dist.is_rank_zero else None
        )

    def note(self, step: int, loss: float) -> bool:
        """Write the weights after `step` steps if `loss`, the same on all ranks, is the least so far. Returns whether it is."""
        if not math.isfinite(loss) or (self.loss is not None and loss >= self.loss):
            return False
        self.loss = loss
        # With the weights, under one rename: without it the next validation, however bad, would overwrite them.
        record = json.dumps({"step": step, "loss": loss, "sample_digest": self._digest}) + "\n"
        export_model(
            self._folder, self._engine, self._model, self._processor, self._dist, {RECORD: record}
        )
        return True


def _recorded(folder: Path, sample_digest: str) -> float | None:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return float(found["loss"]) if found["sample_digest"] == sample_digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
