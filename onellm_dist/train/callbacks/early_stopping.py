"""Counts validations without a better loss; the trainer ends the run when there are too many.

The count is a function of `validation.jsonl`, so that a resumed run continues it.
"""

from __future__ import annotations

import math
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.common.run_files import VALIDATION
from onellm_dist.config.train_sections import EarlyStoppingSection
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.json_lines import read_lines


class EarlyStopping(Callback):
    """Knows whether the validation loss has stopped falling; the same on every rank.

    Args:
        config: the `train.early_stopping` section; None: no run is ended.
        run_dir: the run directory, with the validations of earlier starts.
        dist: the ranks.
        sample_digest: digest of the validation set (only rank 0 needs it); losses over other
            samples do not count.
    """

    def __init__(
        self,
        config: EarlyStoppingSection | None,
        *,
        run_dir: Path,
        dist: Distributed,
        sample_digest: str,
    ) -> None:
        self._config = config
        self._file = run_dir / VALIDATION
        self._dist = dist
        self._digest = sample_digest
        self._best = math.inf
        self._best_steps = 0
        self._worse = 0

    @property
    def reason(self) -> str | None:
        """Why the run ends here, for people; None: it does not."""
        if self._config is None or self._worse < self._config.patience:
            return None
        return (
            f"early stopping: {self._worse} validations in a row were no better than the loss "
            f"{self._best:.4f} after {format_count(self._best_steps, 'step')}"
        )

    def on_fit_start(self) -> None:
        self._read_history()

    def on_rollback(self, step: int) -> None:
        self._read_history()

    def on_validation_end(self, steps_done: int, loss: float) -> None:
        min_delta = 0.0 if self._config is None else self._config.min_delta
        if loss < self._best and loss <= self._best - min_delta:
            self._best = loss
            self._best_steps = steps_done
            self._worse = 0
        else:
            self._worse += 1

    def _read_history(self) -> None:
        """Count what is on disk: the validations after the steps that were done so far."""
        self._best = math.inf
        self._worse = 0
        if self._config is None:
            return

        def read() -> list[tuple[int, float]]:
            return [
                (line["steps_done"], math.nan if line["loss"] is None else line["loss"])
                for line in read_lines(self._file)
                if line.get("sample_digest") == self._digest
            ]

        for steps_done, loss in self._dist.ask_rank_zero(read):
            if steps_done <= self.trainer.state.first_step:
                self.on_validation_end(steps_done, loss)
