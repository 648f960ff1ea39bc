"""The stability monitor: which steps are not applied, and when a run that goes wrong is stopped.

It looks for losses and gradients that are not finite or spike, and counts samples that could not be
read. Every rank sees the same sums, so all decide alike without a message. Loss and gradient norm
are checked before the optimizer applies the step, so an anomaly never reaches the weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError
from onellm_dist.config.schema import StabilitySection

MIN_WINDOW = 8
"""Fewest earlier steps among which a spike stands out from noise."""
SIGMA = 1.4826
"""Standard deviation of a normal distribution divided by its median absolute deviation."""
LOSS_FLOOR = 0.02
"""Smallest scatter of a loss, as a share of the median: a window of nearly equal losses must not
make a spike of every step."""
PAIR_SCATTER = 0.1 * math.log(2)
"""Smallest scatter of the loss of preference pairs, which can approach zero: once most pairs are
decided, a batch with one that is not has many times the median loss, and most of the gradient."""
LOG_NORM_FLOOR = 0.25
"""Smallest scatter of the logarithm of a gradient norm."""
PAIR_LOG_NORM_FLOOR = 1.25
"""Smallest scatter of that logarithm for preference pairs, whose gradients vanish as they are
decided. With the default threshold a spike is 270,000 times the median, more than one undecided
pair makes."""
NORM_FLOOR = 1e-30
"""Gradient norms below it count as it: 0 has no logarithm."""
PAIR_SPIKE_NORM = 1e-4 * math.exp(10 * PAIR_LOG_NORM_FLOOR)
"""With preference pairs no norm below it, 27, is a spike, whatever the threshold. Where all pairs
are decided the norm vanishes, and every later one would be a spike for good, as skipped steps never
enter the window."""


@dataclass(frozen=True)
class Anomaly:
    """Why a step is not applied."""

    kind: str
    """`loss_not_finite`, `gradient_not_finite`, `loss_spike` or `gradient_spike`."""
    reason: str
    """What happened, for people, with figures."""


def robust_z(value: float, window: Sequence[float], floor: float) -> float:
    """How many robust standard deviations `value` lies above the median of `window`.

    Args:
        value: the value to compare.
        window: earlier values.
        floor: smallest standard deviation.
    """
    centre = median(window)
    return (value - centre) / max(SIGMA * median(abs(v - centre) for v in window), floor, 1e-12)


class StabilityMonitor:
    """Checks every step, and counts skipped steps and skipped samples.

    Args:
        config: the `stability` section.
        max_skipped_samples: the run stops when more samples than this could not be read.
        skipped_samples: samples that earlier starts could not read.
        state: the `state()` of the checkpoint that this start resumes from.
        pairs: whether losses are those of preference pairs. Their smallest scatter is PAIR_SCATTER,
            that of gradient norms PAIR_LOG_NORM_FLOOR, and no norm below PAIR_SPIKE_NORM is a
            spike.
    """

    def __init__(
        self,
        config: StabilitySection,
        *,
        max_skipped_samples: int,
        skipped_samples: int = 0,
        state: Mapping[str, Any] | None = None,
        pairs: bool = False,
    ) -> None:
        self.policy = config.policy
        self.skipped_samples = skipped_samples
        """Samples of the whole run that could not be read, earlier starts included."""
        self._config = config
        self._pairs = pairs
        self._least_log_norm = math.log(NORM_FLOOR)
        if pairs:
            least = math.log(PAIR_SPIKE_NORM) - config.threshold * PAIR_LOG_NORM_FLOOR
            self._least_log_norm = max(least, self._least_log_norm)
        self._max_skipped_samples = max_skipped_samples
        self._losses: deque[float] = deque(maxlen=config.window)
        self._log_norms: deque[float] = deque(maxlen=config.window)
        self._skipped_in_a_row = 0
        self.restore(state or {})

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run decides like an undisturbed one."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "skipped": self._skipped_in_a_row,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `state()`; an empty one (another mixture, an old checkpoint) starts anew."""
        self._losses = deque(state.get("losses", ()), maxlen=self._config.window)
        self._log_norms = deque(state.get("log_norms", ()), maxlen=self._config.window)
        self._skipped_in_a_row = int(state.get("skipped", 0))

    def check(self, loss: float, grad_norm: float) -> Anomaly | None:
        """Check a step that is not applied yet.

        Args:
            loss: the loss over all ranks.
            grad_norm: the gradient norm over all ranks, before clipping.

        Returns:
            What is wrong with the step; None where nothing is.
        """
        if not math.isfinite(loss):
            return Anomaly("loss_not_finite", "the loss is not finite")
        if not math.isfinite(grad_norm):
            return Anomaly(
                "gradient_not_finite", "the gradient is not finite, although every loss is"
            )
        floor = LOSS_FLOOR * abs(median(self._losses)) if self._losses else 0.0
        z = self._spike(loss, self._losses, max(floor, PAIR_SCATTER) if self._pairs else floor)
        if z is not None:
            return Anomaly(
                "loss_spike",
                f"loss {loss:.4g} is {z:.1f} robust standard deviations above the median "
                f"{median(self._losses):.4g}",
            )
        floor = PAIR_LOG_NORM_FLOOR if self._pairs else LOG_NORM_FLOOR
        now, *earlier = (
            max(norm, self._least_log_norm) for norm in (_log(grad_norm), *self._log_norms)
        )
        z = self._spike(now, earlier, floor)
        if z is not None:
            return Anomaly(
                "gradient_spike",
                f"gradient norm {grad_norm:.4g} is {z:.1f} robust standard deviations above the "
                f"median {math.exp(median(earlier)):.4g}",
            )
        return None

    def accept(self, loss: float, grad_norm: float) -> None:
        """Remember an applied step: later ones are compared with it."""
        self._losses.append(loss)
        self._log_norms.append(_log(grad_norm))

    def count_step(self, step: int, *, applied: bool, new_skipped_samples: int) -> None:
        """Count a step that is done.

        Args:
            step: index of the step.
            applied: whether it was applied.
            new_skipped_samples: its samples that could not be read.

        Raises:
            OneLLMError: too many steps in a row were skipped, or too many samples.
        """
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.skipped_samples += new_skipped_samples
        if self._skipped_in_a_row >= self._config.max_skipped:
            raise OneLLMError(
                f"{format_count(self._skipped_in_a_row, 'step')} in a row, up to step {step}, "
                "had a loss or "
                "gradient that is not finite, or a spike",
                "each was skipped, so the model no longer learns.",
                "see events.jsonl for the samples; lower optim.lr, or resume from an older "
                "checkpoint.",
            )
        if self.skipped_samples > self._max_skipped_samples:
            raise OneLLMError(
                f"{format_count(self.skipped_samples, 'sample')} could not be read, and "
                "data.max_skipped_samples "
                f"is {self._max_skipped_samples}",
                "something is wrong with the shards or the storage.",
                "see samples/ for the samples and reasons; repair the shards, or raise "
                "data.max_skipped_samples.",
            )

    def _spike(self, value: float, window: Sequence[float], floor: float) -> float | None:
        """The z-score, where it makes `value` a spike."""
        if not self._config.threshold or len(window) < max(MIN_WINDOW, self._config.window // 4):
            return None
        z = robust_z(value, window, floor)
        return z if z > self._config.threshold else None


def _log(norm: float) -> float:
    return math.log(max(norm, NORM_FLOOR))
