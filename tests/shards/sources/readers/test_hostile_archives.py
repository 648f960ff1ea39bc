"""Zip members and tables whose headers promise far more than there is: words, and no memory."""

from __future__ import annotations

import resource
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from source_checks import make_npy

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.nsd import _CaptionTable
from onellm_dist.shards.sources.readers.archives import ArchiveMember

_STORED, _DEFLATED = 0, 8
_HUGE = 1 << 44


def use_no_memory(action: Callable[[], object]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    action()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def member(folder: Path, content: bytes, *, packed: int, size: int, method: int) -> ArchiveMember:
    name = b"cat.flac"
    head = b"PK\x03\x04" + bytes(22) + len(name).to_bytes(2, "little") + bytes(2)
    path = folder / "x.zip"
    path.write_bytes(head + name + content)
    return ArchiveMember((path,), "cat", 0, packed, size, method, 0)


def test_a_member_that_promises_more_than_its_archive_has(tmp_path: Path) -> None:
    for method in (_STORED, _DEFLATED):
        found = member(tmp_path, b"abc", packed=_HUGE, size=100, method=method)

        def read(found: ArchiveMember = found) -> None:
            with pytest.raises(BadSampleError, match=r"^truncated archive: cat in x.zip has 3 of"):
                found.read_bytes()

        use_no_memory(read)


def test_a_member_that_unpacks_to_more_than_a_worker_has(tmp_path: Path) -> None:
    squeeze = zlib.compressobj(9, wbits=-15)
    content = squeeze.compress(bytes(1 << 20)) + squeeze.flush()
    found = member(tmp_path, content, packed=len(content), size=_HUGE, method=_DEFLATED)
    with pytest.raises(
        BadSampleError, match=r"^too large: cat in x.zip would unpack to 17,592,186"
    ):
        found.read_bytes()
    short = member(tmp_path, content, packed=len(content), size=1000, method=_DEFLATED)

    def read() -> None:
        with pytest.raises(BadSampleError, match="fails its CRC-32"):
            short.read_bytes()

    use_no_memory(read)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<U400000000', 'fortran_order': False, 'shape': (2, 5), }",
        b"{'descr': '<U20', 'fortran_order': False, 'shape': (2, 500000000000), }",
        b"{'descr': '<U20', 'fortran_order': False, 'shape': (-2, -5), }",
        b"{'descr': '<U20', 'fortran_order': False, 'shape': (0, 5), }",
        b"{'descr': x, 'fortran_order': False, 'shape': (2, 5), }",
        b"((((",
    ],
)
def test_a_caption_table_that_promises_more_than_its_file_has(
    tmp_path: Path, header: bytes
) -> None:
    path = tmp_path / "captions.npy"
    size = len(header).to_bytes(2, "little")
    path.write_bytes(b"\x93NUMPY\x01\x00" + size + header + bytes(800))

    def read() -> None:
        with pytest.raises(UsageError, match=r"its header says|is not a .npy") as error:
            _CaptionTable(path)
        assert "captions.npy" in error.value.what

    use_no_memory(read)


def test_a_caption_table_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "captions.npy"
    path.write_bytes(make_npy(np.array([["a", "b "], ["c", "dd"]])))
    assert _CaptionTable(path).read_row(1) == ["c", "dd"]
