"""The option `missing`: what becomes of rows whose media are not there."""

from __future__ import annotations

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import Option

MISSING_OPTION = Option(
    "fail",
    "rows whose media are missing: fail (they count as bad samples), or skip (the dataset was "
    "downloaded in part)",
)


def check_missing(choice: str) -> None:
    """Check the value of the option `missing`.

    Raises:
        UsageError: it is neither "fail" nor "skip".
    """
    if choice not in ("fail", "skip"):
        raise UsageError(
            f"missing={choice} is neither fail nor skip.", MISSING_OPTION.help + ".", "choose one."
        )
