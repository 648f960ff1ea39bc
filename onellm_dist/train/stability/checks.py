"""What is done about a run that goes wrong: losses and gradients that are not finite or leap, and too many unreadable samples.

Every rank sees the same sums, so all decide alike with no message between them. Loss and gradient norm are looked at before the optimizer
applies the step, so what is found wrong is never in the weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.config.schema import StabilitySection

FEWEST = 8
"""Steps that must be there before a leap can be told from noise."""
SIGMA = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
LOSS_FLOOR = 0.02
"""A loss scatters by at least this part of its median: a window of nearly equal losses must not make every step a spike."""
LOG_NORM_FLOOR = 0.25
"""A gradient norm scatters by at least this factor of e; norms are compared by their logarithms."""


@dataclass(frozen=True)
class Verdict:
    """Why a step is not one to keep."""

    kind: str
    """`loss_not_finite`, `gradient_not_finite`, `loss_spike`, `gradient_spike`."""
    reason: str
    """For people, figures included."""


def robust_z(value: float, window: Sequence[float], floor: float) -> float:
    """How many robust standard deviations `value` lies above the median of `window`.

    Args:
        floor: the least standard deviation.
    """
    centre = _median(window)
    return (value - centre) / max(SIGMA * _median([abs(v - centre) for v in window]), floor, 1e-12)


class Guard:
    """Looks at every step, and counts what was thrown away.

    Args:
        max_skipped_samples: more unreadable samples stop the run.
        skipped_samples: those of earlier starts.
        state: what `state` gave when the checkpoint was written that this start goes on from.
    """

    def __init__(
        self,
        config: StabilitySection,
        max_skipped_samples: int,
        skipped_samples: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy = config.policy
        self.skipped_samples = skipped_samples
        """Of the whole run, earlier starts included."""
        self._config, self._max_tombstones = config, max_skipped_samples
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._skipped = 0
        self.restore(state or {})

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide as this one would: goes into the manifest."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._norms),
            "skipped": self._skipped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; from nothing where it is empty (another mixture, an old checkpoint)."""
        self._losses = deque(state.get("losses", ()), maxlen=self._config.window)
        self._norms = deque(state.get("log_norms", ()), maxlen=self._config.window)
        self._skipped = int(state.get("skipped", 0))

    def judge(self, loss: float, grad_norm: float) -> Verdict | None:
        """Look at a step that is not applied yet; both figures are of all ranks."""
        if not math.isfinite(loss):
            return Verdict("loss_not_finite", "the loss is not finite")
        if not math.isfinite(grad_norm):
            return Verdict("gradient_not_finite", "the gradient is not finite, every loss is")
        z = self._z(
            loss, self._losses, LOSS_FLOOR * abs(_median(self._losses)) if self._losses else 0.0
        )
        if z is not None:
            return Verdict(
                "loss_spike",
                f"loss {loss:.4g} is {z:.1f} robust deviations above the median {_median(self._losses):.4g}",
            )
        z = self._z(_log(grad_norm), self._norms, LOG_NORM_FLOOR)
        if z is not None:
            middle = math.exp(_median(self._norms))
            return Verdict(
                "gradient_spike",
                f"gradient norm {grad_norm:.4g} is {z:.1f} robust deviations above the median {middle:.4g}",
            )
        return None

    def keep(self, loss: float, grad_norm: float) -> None:
        """Remember a step that was applied: later ones are compared with it."""
        self._losses.append(loss)
        self._norms.append(_log(grad_norm))

    def count(self, step: int, *, applied: bool, new_skipped_samples: int) -> None:
        """Take note of a step.

        Raises:
            OneLLMError: the run should not go on.
        """
        self._skipped = 0 if applied else self._skipped + 1
        self.skipped_samples += new_skipped_samples
        if self._skipped >= self._config.max_skipped:
            raise OneLLMError(
                f"{self._skipped} steps in a row, up to step {step}, had a loss or gradient that is not finite, or a spike",
                "each was skipped, so the model no longer learns.",
                "look at events.jsonl for the samples; lower optim.lr, or resume from an older checkpoint.",
            )
        if self.skipped_samples > self._max_tombstones:
            raise OneLLMError(
                f"{self.skipped_samples} samples could not be read, and data.max_skipped_samples is {self._max_tombstones}",
                "something is wrong with the shards or the storage.",
                "see ledger/ for the samples and reasons; repair the shards, or raise data.max_skipped_samples.",
            )

    def _z(self, value: float, window: Sequence[float], floor: float) -> float | None:
        """The z-score where it makes `value` a spike."""
        if not self._config.threshold or len(window) < max(FEWEST, self._config.window // 4):
            return None
        z = robust_z(value, window, floor)
        return z if z > self._config.threshold else None


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else 0.5 * (ordered[middle - 1] + ordered[middle])
