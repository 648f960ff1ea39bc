"""Metrics of every step: `metrics.jsonl`, TensorBoard, and a line for the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onellm_dist.common.background import BackgroundCalls
from onellm_dist.common.logging import get_logger
from onellm_dist.common.progress import format_seconds
from onellm_dist.common.run_files import TENSORBOARD
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.records.metrics import MetricsFile, StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = get_logger(__name__)
RATE_STEPS = 20
"""Steps over which the terminal line averages its rate."""


class MetricsWriter(Callback):
    """Writes on rank 0; silent elsewhere.

    Args:
        run_dir: the run directory.
        steps: optimizer steps of the whole run.
        log_every: steps between two lines on the terminal.
        enabled: whether this process writes.
    """

    def __init__(self, run_dir: Path, *, steps: int, log_every: int, enabled: bool) -> None:
        self._run_dir = run_dir
        self._steps = steps
        self._log_every = log_every
        self._enabled = enabled
        self._recent: deque[StepMetrics] = deque(maxlen=RATE_STEPS)
        self._file: MetricsFile | None = None
        self._board: SummaryWriter | None = None
        self._calls: BackgroundCalls | None = None
        """Writes to TensorBoard, whose disk may be full or hang."""

    def open(self, first_step: int) -> None:
        """Open the files; lines of `first_step` and later must have been dropped."""
        self.close()
        if self._enabled:
            self._file = MetricsFile(self._run_dir)
            self._calls = BackgroundCalls("tensorboard", self._drop_board)
            self._calls.call("open", self._open_board, first_step)

    def _open_board(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._run_dir / TENSORBOARD), purge_step=first_step)

    def _drop_board(self, call: str, problem: str) -> None:
        log.warning("TensorBoard is no longer written: %s: %s", call, problem)

    def on_fit_start(self) -> None:
        self.open(self.trainer.state.first_step)

    def on_rollback(self, step: int) -> None:
        self._recent.clear()
        self.open(self.trainer.state.first_step)

    def on_metrics(self, metrics: StepMetrics) -> None:
        if self._file is None or self._calls is None:
            return
        self._recent.append(metrics)
        self._file.write(metrics.build_line())
        self._calls.call("write", self._add_scalars, metrics.build_charts(), metrics.step)
        done = metrics.step + 1
        if done % self._log_every == 0 or done == self._steps:
            log.info("%s", self._format(metrics))

    def _add_scalars(self, charts: Mapping[str, float], step: int) -> None:
        assert self._board is not None
        for name, value in charts.items():
            self._board.add_scalar(name, value, step)

    def on_text(self, name: str, text: str, steps_done: int) -> None:
        if self._calls is not None:
            self._calls.call("write", self._add_text, name, text, steps_done)

    def _add_text(self, name: str, text: str, steps_done: int) -> None:
        assert self._board is not None
        self._board.add_text(name, text, steps_done)

    def close(self) -> None:
        self._file = None
        if self._calls is not None:
            self._calls.call("close", self._close_board)
            self._calls.close()
            self._calls = None

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None

    def _format(self, metrics: StepMetrics) -> str:
        """The terminal line of a step; rate and time left are those of the latest steps."""
        seconds = sum(m.seconds for m in self._recent)
        left = (self._steps - metrics.step - 1) * seconds / len(self._recent)
        rate = sum(m["tokens"] for m in self._recent) / seconds
        losses = " ".join(f"{k} {v:.3f}" for k, v in metrics["loss_by_modality"].items())
        mfu = "" if metrics["mfu"] is None else f"  MFU {100 * metrics['mfu']:.1f}%"
        skipped = "" if metrics["applied"] else "  SKIPPED"
        return (
            f"{metrics.step + 1}/{self._steps} steps  loss {metrics['loss']:.4f} ({losses})  "
            f"lr {metrics['lr']:.2e}  |g| {metrics['grad_norm']:.2f}  "
            f"{rate:,.0f} tokens/s{mfu}  ETA {format_seconds(left)}{skipped}"
        )
