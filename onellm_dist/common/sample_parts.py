"""Which parts of a sample hold text, for everything that reads or writes shards."""

from __future__ import annotations

TEXT_EXTENSIONS = ("txt", "json")
"""Where a sample has both, its caption is read from `.txt`."""
