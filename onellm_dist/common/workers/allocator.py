"""The C library's memory allocator, set for processes that read samples."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD = -3
_TRIM_THRESHOLD = -1
_LARGEST = 32 << 20
"""The largest threshold that glibc takes (mallopt(3)), and the largest that it finds by itself."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 64 MiB that it frees at the end of its heap, for the next batch.

    glibc's own thresholds start at 128 KiB, and grow with the blocks that are freed, at most to
    these. Until they have grown, large blocks go back to the system at once and return page by
    page: a batch of 32 pictures (19 MB) costs 5,000 page faults, a tenth of the time of reading it.

    Returns:
        Whether the C library is glibc and took the values.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    taken = [set_option(_TRIM_THRESHOLD, 2 * _LARGEST), set_option(_MMAP_THRESHOLD, _LARGEST)]
    return all(taken)
