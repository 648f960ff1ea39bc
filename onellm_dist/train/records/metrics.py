"""What a run tells: `metrics.jsonl` (one object a step), TensorBoard, a line for people, and `events.jsonl`."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from onellm_dist.common.progress import format_seconds

if TYPE_CHECKING:
    from onellm_dist.train.callbacks.trackers import Trackers

METRICS, EVENTS, TENSORBOARD = "metrics.jsonl", "events.jsonl", "tensorboard"
RATE_STEPS = 20
"""Steps over which the line for people averages its rate."""


SHOWN = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "data_wait_fraction",
    "padding_fraction",
    "pack_balance",
    "mfu",
    "seconds",
    "peak_memory_bytes",
    "checkpoint_stall_seconds",
)
"""Figures of a step that boards and trackers show."""


@dataclass(frozen=True)
class StepReport:
    """One line of `metrics.jsonl`."""

    step: int
    """Index of the step in the plan; the first is 0."""
    loss: float
    loss_by_modality: dict[str, float]
    """Mean cross-entropy of the supervised tokens of the samples of each kind (`image`, `video+audio`, `text`)."""
    lr: float
    grad_norm: float
    """Before clipping; null where the step was skipped."""
    applied: bool
    """False: the gradient was not finite and the step was skipped."""
    samples: int
    supervised_tokens: int
    tokens: int
    """LLM positions of all ranks, runs of modality tokens included."""
    padding_fraction: float
    tokens_per_second: float
    """Of all ranks together."""
    data_wait_fraction: float
    """Share of the step in which rank 0 waited for the loader."""
    mfu: float | None
    """Model FLOPs utilisation by train/flops.py's formula; null where the device's peak is not known."""
    sample_digest: str
    seconds: float
    pack_balance: float = 1.0
    """Predicted cost of the costliest micro-batch over the mean of all ranks' micro-batches in the step."""
    grad_norm_by_part: dict[str, float] = field(default_factory=dict)
    """Gradient norm of each modality's own parameters, of the UPM (`upm`) and of the LLM (`llm`), as far as they train."""
    router_load: dict[str, list[float]] | None = None
    """Modality -> mean weight of each expert; at the log interval, else null."""
    peak_memory_bytes: int | None = None
    """Most bytes that a rank has held so far (GPU memory; resident memory on a CPU); at the log interval, else null."""
    checkpoint_stall_seconds: float = 0.0
    """Seconds between the step before and this one in which training stood still for a checkpoint."""


class Readings(NamedTuple):
    """What a step's report has from `telemetry.Telemetry`."""

    router_load: dict[str, list[float]] | None = None
    peak_memory_bytes: int | None = None
    checkpoint_stall_seconds: float = 0.0


class Metrics:
    """Writes on rank 0; silent elsewhere.

    Args:
        first_step: lines of this step and later ones, left by a start that went further than its last checkpoint, are dropped.
        steps: of the whole run.
        trackers: get the figures too.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        main: bool,
        first_step: int,
        steps: int,
        log_every: int,
        trackers: Trackers | None = None,
    ) -> None:
        self._main, self._steps, self._log_every, self._trackers = main, steps, log_every, trackers
        self._recent: deque[StepReport] = deque(maxlen=RATE_STEPS)
        self.lost_steps, self.lost_seconds = 0, 0.0
        """Steps that an earlier start had done after the checkpoint that this one goes on from: they are done again."""
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        dropped = drop_from(run_dir / METRICS, first_step)
        self.lost_steps, self.lost_seconds = (
            len(dropped),
            sum(float(line.get("seconds", 0.0)) for line in dropped),
        )
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=first_step)

    def write(self, report: StepReport) -> None:
        """Record a step, and print a line every `log_every` steps and at the end."""
        if not self._main:
            return
        self._recent.append(report)
        line = _plain(asdict(report))
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        values = scalars(line)
        for name, value in values.items():
            self._board.add_scalar(name, value, report.step)
        if self._trackers is not None:
            self._trackers.log(values, report.step)
        if (report.step + 1) % self._log_every == 0 or report.step + 1 == self._steps:
            print(self._line(report), flush=True)

    def text(self, name: str, value: str, step: int) -> None:
        """Show a text on the board."""
        if self._main:
            self._board.add_text(name, value, step)

    def close(self) -> None:
        """Flush to the disk."""
        if self._main:
            self._file.close()
            self._board.close()

    def _line(self, report: StepReport) -> str:
        seconds = sum(r.seconds for r in self._recent)
        left = (self._steps - report.step - 1) * seconds / len(self._recent)
        rate = sum(r.tokens for r in self._recent) / seconds
        kinds = " ".join(f"{name} {value:.3f}" for name, value in report.loss_by_modality.items())
        skipped = "" if report.applied else "  SKIPPED"
        mfu = "" if report.mfu is None else f"  MFU {100 * report.mfu:.1f}%"
        return (
            f"step {report.step + 1}/{self._steps}  loss {report.loss:.4f} ({kinds})  lr {report.lr:.2e}  |g| {report.grad_norm:.2f}  "
            f"{rate:,.0f} tokens/s{mfu}  ETA {format_seconds(left)}{skipped}"
        )


class Events:
    """`events.jsonl`: what happened, beside the steps. Rank 0 writes."""

    def __init__(self, run_dir: Path, *, main: bool) -> None:
        self._path = run_dir / EVENTS if main else None

    def write(self, event: str, *, say: str = "", **fields: Any) -> None:
        """Record an event; `say` is printed as well."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as out:
            out.write(
                json.dumps(
                    {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **_plain(fields)}
                )
                + "\n"
            )
        if say:
            print(say, flush=True)


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line of `metrics.jsonl` by the names that boards and trackers show them under."""
    found = {f"train/{name}": line[name] for name in SHOWN if line.get(name) is not None}
    for key in ("loss_by_modality", "grad_norm_by_part"):
        found |= {
            f"{key}/{name}": value
            for name, value in (line.get(key) or {}).items()
            if value is not None
        }
    for name, shares in (line.get("router_load") or {}).items():
        found |= {
            f"router_load/{name}/expert{number}": share for number, share in enumerate(shares)
        }
    return found


def drop_from(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines of step `step` and later, and a last line that a kill cut short. The file is replaced as a whole.

    Returns:
        The lines of step `step` and later.
    """
    if not path.is_file():
        return []
    kept, dropped = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            earlier = entry["step"] < step
        except (json.JSONDecodeError, KeyError):
            continue
        if earlier:
            kept.append(line + "\n")
        else:
            dropped.append(entry)
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
    return dropped


def _plain(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
