"""Coloured point clouds from NumPy, PLY and PCD files."""

from __future__ import annotations

import numpy as np

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.modalities.io.damage import note_damage
from onellm_dist.modalities.library_faults import require_library
from onellm_dist.modalities.limits import LIMITS, check_count

Fields = dict[str, np.ndarray]
"""Name of a field to its values, one per point."""

# fmt: off
_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
    "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8",
}
# fmt: on
_PCD_TYPES = frozenset({"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"})
_FAR = 1000.0
_STANDARDISED = 10.0
_ROUNDED = 1.01
"""Colours a little above 1 are still in 0..1: rounding."""
_COLOUR_NAMES = (
    ("red", "green", "blue"),
    ("r", "g", "b"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
)


def read_cloud(part: Part) -> np.ndarray:
    """Read a coloured point cloud.

    The bytes decide about the format: `.npy` [N, 6] or [N, 7] (with alpha, which is dropped), or
    transposed; PLY ascii and binary; PCD ascii, binary and binary_compressed. Byte colours are
    divided by 255, 16-bit ones by 65535, others by 255 if any is above 1. Floats with negative
    values (standardised colours, up to 10) stay as they are. Points of a PCD without a position
    (NaN: no return) are left out, as PCL does for organised clouds. Other points that are not
    finite, or a thousand times as far away as the median, are left out and noted as damage.

    Returns:
        [N, 6] fp32: x, y, z in the file's units, then red, green, blue, as a rule in [0, 1]. A
        cloud far from the origin is moved there where fp32 would lose its shape.

    Raises:
        SampleError: the format is unknown, the file is cut short, there are no colours, colours are
            out of range, or more than a quarter of the points are damaged.
    """
    name = f".{part.extension}"
    try:
        positions, colours = _read_columns(part)
        check_count(LIMITS["point"], "points", max(1, len(positions)), name)
        return _join_columns(positions, colours, name)
    except (OneLLMError, MemoryError):
        raise
    except Exception as error:  # headers are parsed as text: broken ones raise anything
        require_library(error)
        said = f"its header lacks or misspells {error}" if isinstance(error, KeyError) else ""
        said = said or str(error) or type(error).__name__
        raise _cloud_error(
            name, f"({len(part.data)} bytes) is not a readable point cloud: {said}"
        ) from error


def _read_columns(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Positions [N, 3] and colours [N, 3], in the file's types."""
    if part.data[:6] == b"\x93NUMPY":
        array = read_npy(part, finite=False)
        if array.ndim == 2 and array.shape[0] in (6, 7) and array.shape[1] not in (6, 7):
            array = array.T
        if array.ndim == 2 and 3 in array.shape:
            raise ValueError(
                f"it is an array of shape {array.shape}, positions without colours; the tokenizer "
                f"groups points by their colours"
            )
        if array.ndim != 2 or array.shape[1] not in (6, 7):
            raise ValueError(f"it is an array of shape {array.shape}, not [points, 6]")
        return array[:, :3], array[:, 3:6]
    if part.data[:4] in (b"ply\n", b"ply\r"):
        return _get_columns(_read_ply(part.data))
    if b"FIELDS" in part.data[:2048] and b"VERSION" in part.data[:2048]:
        return _get_columns(_drop_points_without_position(_read_pcd(part.data)))
    raise ValueError("it is neither NumPy (.npy), PLY nor PCD")


def _get_columns(fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    if any(axis not in fields for axis in "xyz"):
        raise ValueError(f"it has no x, y, z, only {', '.join(fields) or 'nothing'}")
    names = next((names for names in _COLOUR_NAMES if all(n in fields for n in names)), None)
    if names is None:
        raise ValueError(
            f"it has no colours, only {', '.join(fields)} "
            f"(the tokenizer groups points by their colours)"
        )
    return np.stack([fields[a] for a in "xyz"], 1), np.stack([fields[n] for n in names], 1)


def _join_columns(positions: np.ndarray, colours: np.ndarray, name: str) -> np.ndarray:
    """[N, 6] fp32 of the points that are good."""
    total = len(positions)
    with np.errstate(over="ignore"):  # what overflows is left out below
        good = np.isfinite(positions.astype(np.float32)).all(1) & np.isfinite(colours).all(1)
    if not good.all():
        positions, colours = positions[good], colours[good]
    xyz = _round_positions(positions)
    near = _find_near(xyz)
    if near is not None:
        xyz, colours = xyz[near], colours[near]
    lost = total - len(xyz)
    if lost:
        note_damage(
            f"{name}: {lost} of {total} points are not finite, or are very far from the others",
            lost / total,
        )
    return np.concatenate([xyz, _scale_colours(colours, name)], axis=1)


def _round_positions(positions: np.ndarray) -> np.ndarray:
    """[N, 3] fp32; moved to the origin first where rounding would lose the shape."""
    if positions.dtype.itemsize > 4 and len(positions):
        centre = positions.mean(0, dtype=np.float64)
        extent = float(np.abs(positions - centre).max())
        if 0 < extent * _FAR < float(np.abs(centre).max()):
            positions = positions - centre
    rounded: np.ndarray = positions.astype(np.float32)
    return rounded


def _find_near(xyz: np.ndarray) -> np.ndarray | None:
    """[N] bool: which points are not a thousand times as far away as the median; None: all.

    A single flipped bit can put a point 10^38 away; scaled to radius 1, the others would be a dot.
    """
    if not len(xyz):
        return None
    wide: np.ndarray = xyz.astype(np.float64)
    some = wide[:: max(1, len(wide) // 256)]
    centre = np.median(some, axis=0)
    reach = float(np.median(np.abs(some - centre).max(1)))
    if np.abs(wide - centre).max() <= _FAR / 10 * reach:  # quick, and true for nearly every cloud
        return None
    distance = np.abs(wide - np.median(wide, axis=0)).max(1)
    middle = float(np.median(distance))
    near: np.ndarray = distance <= _FAR * middle
    return None if middle == 0 or near.all() else near


def _scale_colours(colours: np.ndarray, name: str) -> np.ndarray:
    """[N, 3] of any numeric type to fp32 in [0, 1]; floats with negative values stay."""
    low, high = (float(colours.min()), float(colours.max())) if colours.size else (0.0, 0.0)
    if colours.dtype.kind == "f" and -_STANDARDISED <= low < 0 and high <= _STANDARDISED:
        return colours.astype(np.float32)
    if colours.dtype == np.uint16 and high > 255:
        return (colours / 65535).astype(np.float32)
    if low < 0 or high > 255:
        raise _cloud_error(
            name, f"has colours from {low:g} to {high:g}, neither in 0..1 nor in 0..255"
        )
    divide = colours.dtype == np.uint8 or high > _ROUNDED
    return colours.astype(np.float32) / np.float32(255) if divide else colours.astype(np.float32)


def _cloud_error(name: str, what: str) -> SampleError:
    return SampleError(
        f"{name} {what}",
        "the sample has no usable point cloud.",
        "store points as x y z red green blue: .npy [N, 6], PLY or PCD.",
    )


def _read_header(data: bytes, last: bytes) -> tuple[list[list[str]], int]:
    """The words of each line up to the one that starts with `last`, and where data begins."""
    lines, start = [], 0
    while True:
        end = data.index(b"\n", start)
        line = data[start:end].decode("ascii", "replace").strip()
        start = end + 1
        if line:
            lines.append(line.split())
        if line.startswith(last.decode()):
            return lines, start


def _parse_rows(text: bytes, columns: int, count: int) -> np.ndarray:
    """[count, columns] fp64: the first `count` lines of `columns` numbers each."""
    if not 0 <= count * columns <= len(text):
        raise ValueError(f"{len(text)} bytes where the header says {count} x {columns} numbers")
    words = text.split(None, count * columns)[: count * columns]
    if len(words) != count * columns:
        raise ValueError(f"{len(words)} numbers where the header says {count} x {columns}")
    return np.array(words, dtype=np.float64).reshape(count, columns)


def _cast(column: np.ndarray, kind: str, name: str) -> np.ndarray:
    """[N] numbers that were written as text, in the type that the header states.

    Raises:
        ValueError: an integer field holds something else: a cast would make another number of it.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        cast: np.ndarray = column.astype(kind)
    if cast.dtype.kind != "f" and (cast != column).any():
        bad = column[cast != column][0]
        raise ValueError(f"its field {name} is said to be {cast.dtype}, and holds {bad:g}")
    return cast


def _read_ply(data: bytes) -> Fields:
    """The vertex element, which must be the first one (every writer puts it first)."""
    lines, start = _read_header(data, b"end_header")
    layout = next((words[1] for words in lines if words[0] == "format"), None)
    if layout is None:  # not a StopIteration: a loop over samples would take it for their end
        raise ValueError("its header has no line 'format'")
    elements = [words for words in lines if words[0] == "element"]
    if not elements or elements[0][1] != "vertex":
        raise ValueError("its first element is not 'vertex'")
    first = lines.index(elements[0])
    after = lines.index(elements[1]) if len(elements) > 1 else len(lines)
    properties = [words for words in lines[first:after] if words[0] == "property"]
    if any(words[1] == "list" for words in properties):
        raise ValueError("its vertices have list properties")
    names = [words[2] for words in properties]
    types = [_PLY_TYPES[words[1]] for words in properties]
    count = int(elements[0][2])
    if layout == "ascii":
        table = _parse_rows(data[start:], len(names), count)
        return {
            name: _cast(table[:, i], kind, name)
            for i, (name, kind) in enumerate(zip(names, types, strict=True))
        }
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}[layout]
    return _parse_records(
        data[start:], [(n, order + t) for n, t in zip(names, types, strict=True)], count
    )


def _parse_records(
    body: bytes, layout: list[tuple[str, str]] | list[tuple[str, str, int]], count: int
) -> Fields:
    record = np.dtype(layout)
    if count < 0:
        raise ValueError(f"its header says {count} points")
    if len(body) < count * record.itemsize:
        raise ValueError(f"{len(body)} bytes where the header says {count} x {record.itemsize}")
    table = np.frombuffer(body, record, count)
    # Of a field with several values per point (PCD padding, histograms) only the first is kept: no
    # such field is used.
    return {
        name: table[name] if table[name].ndim == 1 else table[name][:, 0]
        for name in record.names or ()
    }


def _read_pcd(data: bytes) -> Fields:
    """PCD 0.7 (pointclouds.org, "The PCD file format").

    A packed `rgb` or `rgba` becomes red, green and blue bytes.
    """
    lines, start = _read_header(data, b"DATA")
    header = {words[0]: words[1:] for words in lines if not words[0].startswith("#")}
    names = header["FIELDS"]
    kinds = [k.lower() + size for k, size in zip(header["TYPE"], header["SIZE"], strict=True)]
    unknown = sorted(set(kinds) - _PCD_TYPES)
    if unknown:
        raise ValueError(f"its header has fields of type {', '.join(unknown)}")
    counts = [int(c) for c in header.get("COUNT", ["1"] * len(names))]
    if min(counts, default=1) < 1:
        raise ValueError(f"its header has fields of {min(counts)} values")
    total = (
        int(header["POINTS"][0])
        if "POINTS" in header
        else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
    )
    # All padding fields are called "_": each gets a name of its own.
    layout = [
        (f"{n}{i}" if n == "_" else n, "<" + k, c)
        for i, (n, k, c) in enumerate(zip(names, kinds, counts, strict=True))
    ]
    encoding = header["DATA"][0]
    if encoding == "ascii":
        fields = _parse_ascii_pcd(data[start:], layout, total)
    elif encoding == "binary":
        fields = _parse_records(data[start:], layout, total)
    elif encoding == "binary_compressed":
        fields = _parse_compressed_pcd(data[start:], layout, total)
    else:
        raise ValueError(f"DATA {encoding} is unknown")
    return _unpack_colours(fields)


def _parse_ascii_pcd(text: bytes, layout: list[tuple[str, str, int]], total: int) -> Fields:
    table = _parse_rows(text, sum(count for _, _, count in layout), total)
    fields, column = {}, 0
    for name, kind, count in layout:
        fields[name] = _cast(table[:, column], kind, name)
        column += count
    return fields


def _parse_compressed_pcd(body: bytes, layout: list[tuple[str, str, int]], total: int) -> Fields:
    """Field after field, LZF-compressed, after two uint32: compressed and plain size."""
    packed, plain = (int(v) for v in np.frombuffer(body[:8], "<u4"))
    if (
        plain != total * sum(np.dtype(kind).itemsize * count for _, kind, count in layout)
        or len(body) < 8 + packed
    ):
        raise ValueError(
            f"{len(body) - 8} compressed bytes for {plain}, which do not fit its {total} points"
        )
    raw = _decompress_lzf(body[8 : 8 + packed], plain)
    fields, at = {}, 0
    for name, kind, count in layout:
        column = np.frombuffer(raw, kind, total * count, at)
        fields[name] = column.reshape(total, count)[:, 0] if count != 1 else column
        at += column.nbytes
    return fields


def _decompress_lzf(packed: bytes, size: int) -> bytes:
    """Decompress LZF.

    In LibLZF's format a control byte below 32 announces literals, any other one a copy of 3 to 264
    earlier bytes.
    """
    out, at = bytearray(), 0
    while at < len(packed):
        control = packed[at]
        at += 1
        if control < 32:
            out += packed[at : at + control + 1]
            at += control + 1
            continue
        length = (control >> 5) + 2
        if length == 9:
            length += packed[at]
            at += 1
        start = len(out) - ((control & 31) << 8) - packed[at] - 1
        at += 1
        if start < 0:
            raise ValueError("its compressed data points before its start")
        seen = out[start : start + length]
        out += (seen * (length // len(seen) + 1))[:length]  # a copy may overlap what it writes
        if len(out) > size:
            break
    if len(out) != size:
        raise ValueError(f"its compressed data has {len(out)} bytes, not {size}")
    return bytes(out)


def _unpack_colours(fields: Fields) -> Fields:
    packed = fields.get("rgb", fields.get("rgba"))
    if packed is None:
        return fields
    # A float `rgb` holds the bits of 0x00RRGGBB (PCL's old form).
    bits = (
        np.ascontiguousarray(packed, "<f4").view("<u4")
        if packed.dtype.kind == "f"
        else packed.astype(np.int64)
    )
    colours = {
        name: (bits >> shift & 255).astype(np.uint8)
        for name, shift in (("red", 16), ("green", 8), ("blue", 0))
    }
    return {**fields, **colours}


def _drop_points_without_position(fields: Fields) -> Fields:
    if any(axis not in fields for axis in "xyz"):
        return fields
    there = np.isfinite(np.stack([fields[axis] for axis in "xyz"])).all(0)
    return {name: values[there] for name, values in fields.items()}
