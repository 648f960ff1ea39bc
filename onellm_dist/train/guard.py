"""What stops a run that goes wrong: losses that are not finite, step after step, and too many unreadable samples."""

from __future__ import annotations

from onellm_dist.errors import OneLLMError

MAX_SKIPPED_IN_A_ROW = 10


class Guard:
    """Counts skipped steps and tombstones; every rank sees the same numbers, so all stop together."""

    def __init__(self, max_tombstones: int, tombstones: int = 0) -> None:
        self.tombstones = tombstones
        """Of the whole run, earlier starts included."""
        self._max_tombstones = max_tombstones
        self._skipped = 0

    def after_step(self, step: int, *, applied: bool, new_tombstones: int) -> None:
        """Take note of a step.

        Raises:
            OneLLMError: the run should not go on.
        """
        self._skipped = 0 if applied else self._skipped + 1
        self.tombstones += new_tombstones
        if self._skipped >= MAX_SKIPPED_IN_A_ROW:
            raise OneLLMError(
                f"{self._skipped} steps in a row, up to step {step}, had a gradient that is not finite",
                "each was skipped, so the model no longer learns.",
                "look at events.jsonl for the samples; lower optim.lr, or resume from an older checkpoint.",
            )
        if self.tombstones > self._max_tombstones:
            raise OneLLMError(
                f"{self.tombstones} samples could not be read, and data.max_tombstones is {self._max_tombstones}",
                "something is wrong with the shards or the storage.",
                "see ledger/ for the samples and reasons; repair the shards, or raise data.max_tombstones.",
            )
