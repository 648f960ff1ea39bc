"""What a pool says: the names of its workers and limits, and its errors."""

from __future__ import annotations

from typing import NamedTuple

from onellm_dist.common.errors import MachineError


class PoolWords(NamedTuple):
    """What a pool's workers and settings are called in messages."""

    worker: str
    """`loader worker`."""
    result: str
    """What a worker hands over: `batch`."""
    parent: str
    """The process that it works for: `training process`."""
    seconds: str
    """The setting of a sample's time."""
    megabytes: str
    """The setting of a sample's memory."""
    fewer: str
    """How to need less memory: `use fewer ...`."""


def make_memory_error(words: PoolWords, detail: str) -> MachineError:
    """Make the error of a worker that has no memory for its result, or no file descriptor."""
    return MachineError(
        f"a {words.worker} cannot hand its {words.result} to the {words.parent}: {detail}",
        "the machine or its container has no memory, or this user no file descriptor, left for "
        "it; no sample is at fault.",
        f"{words.fewer}, give the job more memory, or raise `ulimit -n`.",
    )


def make_endless_error(words: PoolWords, pid: int, seconds: float) -> MachineError:
    """Make the error of a worker that was killed and does not end."""
    return MachineError(
        f"a {words.worker} (process {pid}) was killed and has not ended for {seconds:g} s",
        "the kernel cannot end a process that waits for a disk or a driver; no sample is at fault.",
        "look in the kernel's log (dmesg) for disks and file systems that do not answer, and start "
        "again, on another machine if they stay so.",
    )
