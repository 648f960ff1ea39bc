"""Output that nobody reads never holds up a process."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onellm_dist.common import logging as onellm_logging
from onellm_dist.common.logging import (
    ONCE,
    ROOT,
    configure_logging,
    get_logger,
    write_unless_blocked,
)


@pytest.fixture
def package_logger() -> Iterator[None]:
    """The package's logger is afterwards what it was before."""
    logger = logging.getLogger(ROOT)
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_pipe_that_nobody_reads_loses_text_and_blocks_nobody() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as pipe, os.fdopen(writing, "w") as stream:
        started = time.monotonic()
        written = [
            write_unless_blocked(stream, f"{number} {'x' * 5000}\n") for number in range(200)
        ]
        assert time.monotonic() - started < onellm_logging.BLOCKED_MS / 1000 + 5
        assert written[0] and not written[-1]
        os.set_blocking(reading, False)
        while pipe.read(1 << 16):
            pass
        assert write_unless_blocked(stream, "read again\n")
        assert pipe.read(1 << 16) == b"read again\n"


def test_a_closed_pipe_and_a_full_disk_are_no_errors() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    assert not write_unless_blocked(stream, "x")
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    assert not write_unless_blocked(stream, "x")
    if Path("/dev/full").exists():
        full = open("/dev/full", "w")  # noqa: SIM115 (closing it fails)
        assert not write_unless_blocked(full, "x")
        os.close(full.fileno())


@pytest.mark.parametrize("rank", [0, 2])
def test_what_all_ranks_say_alike_is_shown_once(
    rank: int, capsys: pytest.CaptureFixture[str], package_logger: None
) -> None:
    configure_logging(rank=rank, world_size=4)
    log = get_logger("onellm_dist.anything")
    log.warning("all alike", extra=ONCE)
    log.warning("its own")
    shown = capsys.readouterr().err.splitlines()
    assert shown == (
        ["rank 2: WARNING: its own"] if rank else ["WARNING: all alike", "WARNING: its own"]
    )


def test_streams_without_a_file_are_written_to() -> None:
    stream = io.StringIO()
    assert write_unless_blocked(stream, "x" * 3000) and len(stream.getvalue()) == 3000
