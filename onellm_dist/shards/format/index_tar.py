"""Index an existing WebDataset tar without rewriting it; the worker processes need no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from onellm_dist.common.errors import OneLLMError
from onellm_dist.shards.format.index import pack_index, write_index
from onellm_dist.shards.format.tars import scan_tar


class SkippedMembers(NamedTuple):
    """Members of tars that belong to no sample, although some of them look so."""

    hidden: int = 0
    """Files with a name that begins with a dot."""
    links: int = 0
    """Hard and symbolic links, which hold no bytes."""


def index_tar(path: Path, *, any_key: bool = False) -> Path:
    """Index a tar, which is only read, and return the path of the index.

    Args:
        path: the tar.
        any_key: whether keys are accepted that readers may skip or take for another.

    Raises:
        OneLLMError: the file is not a tar, or is truncated, damaged or compressed, or has a key or
            a part twice, or a key that no reader would find. The message names tar, key and
            offset. No index is written, and an older one stays as it was.
    """
    return _index_tar(path, any_key=any_key)[0]


def _index_tar(path: Path, *, any_key: bool = False) -> tuple[Path, SkippedMembers]:
    scan = scan_tar(path, any_key=any_key)
    data = pack_index(
        scan.rows, tar_name=path.name, tar_bytes=scan.bytes, tar_sha256=scan.sha256, end=scan.end
    )
    return write_index(path, data), SkippedMembers(scan.hidden, scan.links)


def try_index_tar(path: Path) -> OneLLMError | SkippedMembers:
    """Index a tar.

    Returns:
        What was skipped in it; or the error, which is not raised.
    """
    try:
        return _index_tar(path)[1]
    except OneLLMError as error:
        return error
    except OSError as error:
        return OneLLMError(
            f"{error.filename or path}: {error.strerror or error}.",
            "the tar is not indexed.",
            "check the disk and its permissions; the index is written beside the tar.",
        )
