"""Decoders that hang, crash or eat memory at files that say so."""

from __future__ import annotations

import ctypes
import faulthandler
from collections.abc import Callable, Mapping
from typing import Any

from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.pictures import decode_picture
from onellm_dist.shards.build import images

SECONDS, MEGABYTES = 1.0, 200
LIMITS: dict[str, Any] = {"sample_seconds": SECONDS, "sample_mb": MEGABYTES}


def crash() -> None:
    faulthandler.disable()  # pytest's; the crash is meant
    ctypes.string_at(0)


def hang() -> None:
    ctypes.CDLL(None).pause()  # in C code, which no exception of Python ends


def spin() -> None:
    while True:
        pass


def eat() -> None:
    kept = []
    while True:
        kept.append(bytearray(1 << 24))


FAULTS: dict[str, tuple[Callable[[], None], str]] = {
    "crash": (crash, "crashed (SIGSEGV)"),
    "hang": (hang, f"took more than {SECONDS:g} s (sample_seconds)"),
    "spin": (spin, f"took more than {SECONDS:g} s (sample_seconds)"),
    "eat": (eat, f"needed more than {MEGABYTES} MiB (sample_mb)"),
}


def make_poison(fault: str) -> bytes:
    """A file at which a planted decoder does what it says."""
    return f"POISON {fault}\n".encode()


def get_reason(fault: str) -> str:
    """What the build says about such a file."""
    return f"decoder failed: its worker {FAULTS[fault][1]}, twice"


def _poison(part: Part) -> None:
    if part.data.startswith(b"POISON "):
        FAULTS[part.data.split()[1].decode()][0]()


def plant(set_attribute: Callable[[Any, str, Any], None], *names: str) -> None:
    """Plant the faults in the decoders of modalities, and where the builder re-encodes pictures."""
    for name in names:
        kind: Any = type(get_modality(name))

        def planted(
            self: Any, parts: Mapping[str, Part], meta: Mapping[str, Any], decode: Any = kind.decode
        ) -> Any:
            for part in parts.values():
                _poison(part)
            return decode(self, parts, meta)

        set_attribute(kind, "decode", planted)

    def decode(part: Part) -> Any:
        _poison(part)
        return decode_picture(part)

    set_attribute(images, "decode_picture", decode)
