"""Errors that users read (what was wrong, why it matters, what to do), and the exit codes."""

from __future__ import annotations

import re
from typing import Any

from onellm_dist.common.secrets import mask_text

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75
EXIT_CODES = {
    "done": EXIT_DONE,
    "failed": EXIT_FAILED,
    "usage": EXIT_USAGE,
    "preempted": EXIT_PREEMPTED,
}
"""Exit code of each `status` in `exit.json`."""


class OneLLMError(Exception):
    """An error with a message for the user, in which secrets are masked.

    Args:
        what: what was wrong, with the file, key and value.
        why: why it matters.
        do: what to do about it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        self.what, self.why, self.do = map(mask_text, (what, why, do))
        super().__init__("\n".join(line for line in (self.what, self.why, self.do) if line))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own pickling would pass the joined message as `what`; loader workers send
        # errors this way.
        return type(self), (self.what, self.why, self.do)


class UsageError(OneLLMError):
    """Wrong usage or configuration: nothing was started, nothing was changed (exit code 2)."""

    exit_code = EXIT_USAGE


class MachineError(OneLLMError):
    """The machine failed (memory, a disk, a process): no sample and no key of the recipe did."""


class BudgetLoweredError(MachineError):
    """A rank ran out of memory, and the run's token budgets are lower now: it must start again."""


class RunInUseError(OneLLMError):
    """Another start of the run is still running: this one is refused, and has changed nothing."""


_ADDRESS = re.compile(r" (?:at|@) 0x[0-9a-fA-F]{4,}(?=[>\]])")
"""Where an object lies in memory, as libraries print it: `<_io.BytesIO object at 0x7f...>`."""


class SampleError(OneLLMError):
    """One sample cannot be read; the message names dataset, shard and key if they are known.

    The same bytes give the same message in every process: it is recorded, compared and counted. So
    what libraries say is kept without the addresses of their objects.

    Args:
        what: as of `OneLLMError`.
        why: as of `OneLLMError`.
        do: as of `OneLLMError`.
    """

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        super().__init__(_ADDRESS.sub("", what), _ADDRESS.sub("", why), do)
