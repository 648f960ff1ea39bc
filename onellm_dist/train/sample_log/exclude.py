"""`onellm samples exclude`: leave samples out of a run from its next start on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, OneLLMError, UsageError
from onellm_dist.common.output import write_output
from onellm_dist.common.run_files import EXCLUDE_LIST
from onellm_dist.data.exclusions import add_entries
from onellm_dist.train.sample_log.stream import RunStream, UnopenedDatasetError

_EPOCH = re.compile(r"@[0-9]+$")
_FULL_ID = re.compile(r"[^/]+/[^/]+/.+")


def exclude_command(run_dir: Path, keys: Sequence[str]) -> int:
    """Add samples or shards to the run's own list, and say what was added.

    Args:
        run_dir: the run directory.
        keys: ids of samples (`dataset/shard/key`, with or without `@epoch`; the beginning of one
            is enough where only one sample has it), or `dataset/shard` for a whole shard.

    Returns:
        The exit code.

    Raises:
        UsageError: the directory is not a run's, or there is no such sample or shard.
    """
    if not keys:
        raise UsageError(
            "no sample was given",
            "nothing would be left out.",
            "name samples as `onellm samples RUN --step N` prints them.",
        )
    stream = RunStream(run_dir)
    entries = [_find_entry(stream, key) for key in keys]
    path = run_dir / EXCLUDE_LIST
    new = add_entries(path, entries)
    for entry in dict.fromkeys(entries):
        write_output(f"{entry}: {'left out' if entry in new else 'was left out already'}")
    write_output(f"{path} holds from the next start of the run on")
    return EXIT_DONE


def _find_entry(stream: RunStream, key: str) -> str:
    """The entry of a list that a key means: the sample in every epoch, or the shard."""
    name = _EPOCH.sub("", key).rstrip("/")
    try:
        if stream.has_shard(name):
            return name
        return stream.find_sample(name).name
    except OneLLMError as error:
        refused = isinstance(error, UsageError) and not isinstance(error, UnopenedDatasetError)
        # A dataset cannot be opened, or its shards are not those that the run has read: an id in
        # full says what is meant.
        if refused or not _FULL_ID.fullmatch(name) or name.split("/")[0] not in stream.names:
            raise
        return name
