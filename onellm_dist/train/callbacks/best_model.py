"""The weights with the lowest validation loss: `<run.dir>/best`, a `save_pretrained` directory.

`best.json` in it says `steps_done`, `loss` and `sample_digest` of the validation set.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import BEST, BEST_RECORD
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.export.model import ExportError, export_model

log = get_logger(__name__)


class BestModel(Callback):
    """Exports the model whenever its validation loss is the lowest so far.

    What an earlier start left in the folder still counts, if it was measured on the same samples.

    Args:
        run_dir: the run directory.
        engine: holds the weights.
        model: the transformers model whose weights the engine holds.
        processor: its processor.
        dist: the ranks.
        sample_digest: digest of the validation set (only rank 0 needs it).
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        engine: Engine,
        model: Any,
        processor: Any,
        dist: Distributed,
        sample_digest: str,
    ) -> None:
        self._folder = run_dir / BEST
        self._engine = engine
        self._model = model
        self._processor = processor
        self._dist = dist
        self._digest = sample_digest
        self.loss = dist.ask_rank_zero(lambda: _read_loss(self._folder, sample_digest))
        """The lowest loss so far."""

    def on_validation_end(self, steps_done: int, loss: float) -> None:
        if self.update(steps_done, loss):
            self.trainer.events.write(
                "best_model", steps_done=steps_done, loss=loss, folder=str(self._folder)
            )

    def update(self, steps_done: int, loss: float) -> bool:
        """Export the weights if `loss` is the lowest so far; return whether it is."""
        if not math.isfinite(loss) or (self.loss is not None and loss >= self.loss):
            return False
        # The record is renamed into place with the weights: without it the next validation, however
        # bad, would overwrite them.
        record = {"steps_done": steps_done, "loss": loss, "sample_digest": self._digest}
        beside = {BEST_RECORD: json.dumps(record) + "\n"}
        notes = {"steps done": steps_done, "validation loss": loss}
        model, processor = self._model, self._processor
        try:  # it fails on every rank or on none
            export_model(self._folder, self._engine, model, processor, self._dist, notes, beside)
        except ExportError as error:
            if self._dist.is_rank_zero:
                log.warning("the best model after %d steps is not kept: %s", steps_done, error.what)
            return False
        self.loss = loss
        return True


def _read_loss(folder: Path, sample_digest: str) -> float | None:
    try:
        found = json.loads((folder / BEST_RECORD).read_text(encoding="utf-8"))
        return float(found["loss"]) if found["sample_digest"] == sample_digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
