"""Pickles that ask for much: each ends in words, in little time and memory."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.common.bounded_pickle import BoundedUnpickler, check_shape
from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.readers.safe_pickle import load_plain

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.integers(-(2**63), 2**63), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_values_come_back_as_they_were(value: Any, protocol: int) -> None:
    found = BoundedUnpickler(pickle.dumps(value, protocol=protocol)).load()
    assert repr(found) == repr(value)


def share(depth: int) -> bytes:
    """A list in itself twice, and that again: 2^depth items for whoever walks through it."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return pickle.dumps(value)


def loop() -> bytes:
    value: list[Any] = []
    value.append(value)
    return pickle.dumps(value)


HOSTILE = {
    "nested tuples": b"N" + b"\x85" * 200_000 + b".",
    "nested tuples as a key": b"}" + b"N" + b"\x85" * 100_000 + b"Ns.",
    "an array of 16 GiB": b"\x96" + (2**34).to_bytes(8, "little") + b".",
    "bytes of 16 GiB": b"\x8e" + (2**34).to_bytes(8, "little") + b".",
    "an endless list": loop(),
    "2^40 items in 200 bytes": share(40),
    "a huge number": pickle.dumps(2**4000),
    "keys that collide": pickle.dumps({i * (2**61 - 1): 0 for i in range(100)}),
    "an extension": b"\x82\x01.",
    "a name": pickle.dumps(Path("x")),
    "an object that is stored elsewhere": b"U\x01aQ.",
    "a state for a list": b"]}b.",
    "nothing": b"",
    "no end": b"]",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.seconds
def test_hostile_pickles_end_in_words(what: str, tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(HOSTILE[what])
    with pytest.raises((pickle.UnpicklingError, ValueError), match=r"\w"):
        BoundedUnpickler(HOSTILE[what]).load()
    with pytest.raises(UsageError, match="is not a pickle of plain values"):
        load_plain(tmp_path / "refs.p")


def test_the_number_of_operations_has_a_bound() -> None:
    class Short(BoundedUnpickler):
        most_operations = 100

    assert Short(b"]" * 99 + b".").load() == []
    with pytest.raises(pickle.UnpicklingError, match="more than 100 operations"):
        Short(b"]" * 100 + b".").load()


def test_numbers_in_the_file_allocate_nothing() -> None:
    """The unpickler in C makes a table of 16 GiB of the second one's bytes."""
    frame = b"\x80\x04\x95" + (2**34).to_bytes(8, "little") + b"N."
    assert BoundedUnpickler(frame).load() is None
    assert BoundedUnpickler(b"Nr\xff\xff\xff\x7f.").load() is None


def test_functions_and_classes_get_no_state() -> None:
    class Names(BoundedUnpickler):
        buildable = (OrderedDict,)

        def find_class(self, module: str, name: str) -> Any:
            return {"f": check_shape, "d": OrderedDict}[name]

    with pytest.raises(pickle.UnpicklingError, match="it changes an object of type function"):
        Names(b"cx\nf\n}(X\x04\x00\x00\x00evilK\x01ub.").load()
    assert not hasattr(check_shape, "evil")
    assert Names(b"cx\nd\n)R}X\x01\x00\x00\x00aK\x01sb.").load() == OrderedDict()
