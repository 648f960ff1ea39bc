"""The files of `model.path`, hashed once by each node before a run reads them.

The ranks of a node share its files, so that several are read at once; every node looks at its own
copy, and finds it in its page cache when the weights are loaded. With SHA extensions a core hashes
about 1.5 GB/s: the 13 GB of a 7B model in three files take about 4 s, as one file 9 s.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common.checksums import (
    get_hash,
    hash_once,
    list_recorded_files,
    make_checksum_error,
    remember_hash,
)
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.train.distributed import Distributed


def hash_on_node(paths: Sequence[Path], dist: Distributed) -> dict[Path, str]:
    """SHA-256 of files, each read by one of the ranks of this node; known ones are not read again.

    All ranks call it together, with the same files.

    Args:
        paths: the files.
        dist: the ranks.

    Returns:
        File -> its SHA-256, or, if it cannot be read, the reason as a sentence with a blank.
    """
    names = dist.gather(socket.gethostname())
    peers = [rank for rank, name in enumerate(names) if name == names[dist.rank]]
    own = {path: _hash(path) for path in paths[peers.index(dist.rank) :: len(peers)]}
    found: dict[Path, str] = {}
    for rank, part in enumerate(dist.gather(own)):
        if rank in peers:
            found |= part
    for path, digest in found.items():
        if path not in own and is_digest(digest):
            _remember(path, digest)
    return found


def is_digest(found: str) -> bool:
    """Whether a result of `hash_on_node` is a digest, not the reason why there is none."""
    return " " not in found


def _hash(path: Path) -> str:
    try:
        return hash_once(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error}"


def _remember(path: Path, digest: str) -> None:
    try:
        if get_hash(path) is None:
            remember_hash(path, digest)
    except OSError:
        return  # it went away, which its reader will say


def check_weights(folder: Path, dist: Distributed) -> None:
    """Compare the files of a model with the checksums that its folder records, if it does.

    All ranks call it together, and all raise if one finds damage.

    Args:
        folder: `model.path`.
        dist: the ranks.

    Raises:
        UsageError: a file was changed or damaged, or the record is damaged.
        OneLLMError: a file cannot be read.
    """
    recorded: dict[Path, str] = {}
    problem: OneLLMError | None = None
    try:
        recorded = list_recorded_files(folder)
    except UsageError as error:
        problem = error
    # Nodes may have copies of their own, of which one alone is incomplete.
    lists = dist.gather(sorted(recorded))
    paths = sorted({path for part in lists for path in part})
    for path, found in hash_on_node(paths, dist).items() if paths else ():
        if path not in recorded or problem is not None:
            continue
        if not is_digest(found):
            problem = OneLLMError(
                f"{folder}: {found}",
                "the weights are read from it.",
                "check the disk, or copy it again.",
            )
        elif found != recorded[path]:
            problem = make_checksum_error(path)
    for rank, found_there in enumerate(dist.gather(problem)):
        if found_there is not None:
            raise found_there if rank == dist.rank else _name_rank(found_there, rank)


def _name_rank(error: OneLLMError, rank: int) -> OneLLMError:
    return type(error)(f"rank {rank}: {error.what}", error.why, error.do)
