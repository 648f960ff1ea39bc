"""Failures of the machine while an LLM is tried: they say nothing about the LLM.

Memory runs out, a disk fails, a library is missing or broken. None of these may become "this family
is refused", or a slower way to run it, least of all in a cache.
"""

from __future__ import annotations

import torch

from onellm_dist.common.errors import MachineError, OneLLMError, UsageError

_OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory")
"""Words of the RuntimeErrors that torch raises where Python raises MemoryError."""


def raise_machine_fault(error: BaseException) -> None:
    """Raise an exception again if the machine is at fault, not the LLM.

    Args:
        error: what the LLM's code raised.
    """
    if _find_fault(error) is not None:
        raise error


def make_fault_error(model_type: str, error: BaseException) -> OneLLMError | None:
    """What to tell the user about a failure of the machine; None if it is none.

    Args:
        model_type: the LLM's family.
        error: what the check raised.
    """
    fault = _find_fault(error)
    if fault is None:
        return None
    lines = str(fault).strip().splitlines()
    what = (
        f"the LLM {model_type} could not be checked: "
        f"{type(fault).__name__}{': ' + lines[0] if lines else ''}"
    )
    why = "whether its packed samples are exact is not known; nothing about it was recorded."
    if isinstance(fault, ImportError):
        return UsageError(what, why, "install or repair what its code imports, and start again.")
    if isinstance(fault, OSError):
        return MachineError(what, why, "make sure that the file or disk works, and start again.")
    return MachineError(
        what,
        why,
        "free memory (few families need more than 1 GB for it), or start where there is more.",
    )


def _find_fault(error: BaseException | None) -> BaseException | None:
    """The machine's failure that an exception is, or that it was raised from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, MemoryError | OSError | ImportError | torch.OutOfMemoryError):
            return error
        if isinstance(error, RuntimeError) and any(w in str(error) for w in _OUT_OF_MEMORY):
            return error
        seen.append(error)
        error = error.__cause__
    return None
