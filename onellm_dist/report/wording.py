"""Counts, durations and times as people read them."""

from __future__ import annotations

import time

from onellm_dist.common.progress import format_seconds


def format_duration(seconds: float) -> str:
    """Seconds for people, short ones with their fractions."""
    return f"{seconds:.2g} s" if seconds < 10 else format_seconds(seconds)


def format_time(seconds: float) -> str:
    """A moment (seconds since 1970) in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
