"""`data.pack_*_tokens`: a number of tokens, or `auto`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PositiveInt

AUTO: Literal["auto"] = "auto"
"""The planner finds the budget at the start, for the devices at hand."""


def _check(value: Any) -> Any:
    """One message for a wrong value, in place of one for each type that it is not."""
    if value == AUTO:
        return value
    try:
        number = None if isinstance(value, bool) else int(value)
        is_whole = number is not None and number == float(value)
    except (TypeError, ValueError, OverflowError):  # OverflowError: infinity, and 10**400
        number, is_whole = None, False
    if number is None or not is_whole or number <= 0:
        raise ValueError("give a number of tokens above 0, or auto")
    return number


PackTokens = Annotated[PositiveInt | Literal["auto"], BeforeValidator(_check)]
