"""Mutations for the fuzz room: of bytes, of JSON values, of lines; each a pure function of a seed.

A mutator takes a `random.Random` and the seeds, and returns one input. `mutate_any` combines
several; mutators of one format live beside its tests.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]

NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
"""Integers at the edges of what fields hold."""
STRINGS = (
    "",
    " ",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../../b",
    "a//b",
    "x\0y",
    "\n",
    "\x1b[31m",
    "-rf",
    "~",
    "$HOME",
    "%s%n",
    "a" * 300,
    "a" * 70_000,
    "\ud83d",
    "\u202e",
    "[x]",
    "*",
    "café",
    "cafe\u0301",
    "{{7*7}}",
    "<script>",
    "null",
    "1e999",
    "nan",
)
"""Texts that programs trip over."""
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    -0.0,
    1e308,
    1e999,
    float("nan"),
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    [],
    {},
    [[]],
    [None],
    {"": 0},
    *STRINGS,
)
"""JSON values that a field does not expect."""


def mutate_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Apply one to six changes of bytes to a seed: flips, cuts, copies, numbers, another seed."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_CHANGES)(rng, data, seeds)
    return bytes(data)


def flip_bit(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Flip one bit of a seed."""
    data = bytearray(rng.choice(seeds))
    _flip(rng, data, seeds)
    return bytes(data)


def _at(rng: random.Random, data: bytearray) -> int:
    """A place: often near the start, where headers lie."""
    size = max(1, len(data))
    return rng.randrange(min(size, 512)) if rng.random() < 0.4 else rng.randrange(size)


def _flip(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[_at(rng, data)] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[_at(rng, data)] = rng.choice((0, 255, 127, 128, 32, 10, rng.randrange(256)))


def _write_number(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % (1 << (8 * width))
    at = _at(rng, data) // width * width
    data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))


def _cut(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_at(rng, data) :]


def _delete(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, data)
    del data[at : at + rng.choice((1, 1, 2, 4, 8, 64, 512))]


def _insert(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, data)
    filler = rng.choice((b"\0", b"\xff", b" ", b"A", rng.randbytes(1)))
    data[at:at] = filler * rng.choice((1, 1, 2, 4, 8, 64, 512, 4096))


def _zero(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at, count = _at(rng, data), rng.choice((1, 4, 64, 512))
    data[at : at + count] = bytes(len(data[at : at + count]))


def _duplicate(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at, count = _at(rng, data), rng.choice((1, 8, 64, 512, 4096))
    data[at:at] = data[at : at + count]


def _swap(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    count = rng.choice((1, 4, 8, 64, 512))
    a, b = _at(rng, data), _at(rng, data)
    if abs(a - b) >= count and max(a, b) + count <= len(data):
        data[a : a + count], data[b : b + count] = data[b : b + count], data[a : a + count]


def _splice(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    at = _at(rng, data)
    data[at:] = other[min(at, len(other)) :]


_CHANGES = (
    _flip,
    _flip,
    _flip,
    _set,
    _write_number,
    _write_number,
    _cut,
    _delete,
    _insert,
    _zero,
    _duplicate,
    _swap,
    _splice,
)


def mutate_json(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change one to three values, keys or members of a JSON seed; it stays JSON (or nearly)."""
    value = json.loads(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = mutate_value(rng, value)
    return dump_json(rng, value)


def dump_json(rng: random.Random, value: Any) -> bytes:
    """Write a value as JSON; seldom with a key twice, nested deeply, or in another encoding."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    kind = rng.random()
    if kind < 0.02:
        text = "[" * 100_000 + text
    elif kind < 0.04:
        text = text.replace("{", '{"name": "twice", ', 1) if value else text
    elif kind < 0.05:
        return text.encode("utf-16", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Change one place of a JSON value, at any depth, and return the value."""
    places = list(_list_places(value))
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    parent, key = rng.choice(places)
    _change(rng, parent, key)
    return value


def _list_places(value: Any) -> Any:
    if not isinstance(value, (dict, list)):
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        yield from _list_places(child)


def _change(rng: random.Random, parent: Any, key: Any) -> None:
    old = parent[key]
    action = rng.randrange(8)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[rng.choice(STRINGS)] = parent.pop(key)
    elif action == 1:
        parent.insert(key, old)
    elif action == 2:
        others = list(parent.values()) if isinstance(parent, dict) else list(parent)
        parent[key] = copy.deepcopy(rng.choice(others))
    elif action == 3 and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        parent[key] = old[:at] + rng.choice(("", "/", "..", "\0", "é", "X")) + old[at + 1 :]
    elif action == 3 and isinstance(old, int):
        parent[key] = old + rng.choice((-1, 1, -old, old, 2**32, -(2**40)))
    elif action == 4 and isinstance(old, str):
        parent[key] = rng.choice(STRINGS)
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def mutate_lines(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change a seed of lines: drop, repeat, swap, empty or cut lines, or change their bytes."""
    lines = rng.choice(seeds).split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        action = rng.randrange(6)
        if action == 0 and len(lines) > 1:
            del lines[at]
        elif action == 1:
            lines.insert(at, rng.choice(lines))
        elif action == 2:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        elif action == 3:
            lines[at] = rng.choice(STRINGS).encode("utf-8", "surrogatepass")
        else:
            lines[at] = mutate_bytes(rng, [lines[at]])
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n")).join(lines)


def mutate_json_lines(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change a value of one line, or the lines themselves."""
    lines = rng.choice(seeds).split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    if rng.random() < 0.7 and lines[at]:
        changed = json.dumps(mutate_value(rng, json.loads(lines[at])), ensure_ascii=False)
        lines[at] = changed.encode("utf-8", "surrogatepass")
        return b"\n".join(lines)
    return mutate_lines(rng, seeds)


def mutate_any(*mutators: Mutator) -> Mutator:
    """Make a mutator that uses one of several, each as often."""

    def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        return rng.choice(mutators)(rng, seeds)

    return mutate
