"""Telling a library that does not fit from a file that is bad.

Decoders raise nearly anything for broken bytes, so what they raise makes a bad sample. A library
that is too old or half installed fails for every file, and none of them is bad.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from onellm_dist.common.errors import OneLLMError, SampleError

_OWN = "onellm_dist"
_OTHER_ARGUMENTS = re.compile(r"unexpected keyword argument|positional arguments? ")


def require_library(error: BaseException) -> None:
    """Raise OneLLMError if an exception shows that an installed library lacks what is used of it.

    It does if a module cannot be imported, if a library's module or object is asked from outside of
    it for an attribute that it does not have, or if a line of ours gives a function an argument
    that it does not take. Inside a library the same may mean that the bytes are broken.

    Args:
        error: what a decoder raised.

    Raises:
        OneLLMError: the library is the cause.
    """
    library = _find_library(error)
    if library is not None:
        raise OneLLMError(
            f"{library} does not fit: {type(error).__name__}: {error}",
            "it fails alike for every file, and good samples would be called bad.",
            "`onellm doctor` shows which versions are needed and how to get them.",
        ) from error


@contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turn a decoder's unexpected exception into a SampleError: a strange file costs one sample.

    Lack of memory and errors of the disk are the machine's and stay what they are.
    """
    try:
        yield
    except (OneLLMError, MemoryError, OSError):
        raise
    except Exception as error:
        require_library(error)
        raise SampleError(
            f"unreadable {name}: {type(error).__name__}: {error}",
            "it cannot be decoded.",
            "encode it again, or drop the sample.",
        ) from error


def _find_library(error: BaseException) -> str | None:
    """The library that an exception shows at fault, with its version; None: the bytes may be."""
    asking = _get_place(error).partition(".")[0]
    if isinstance(error, ImportError):
        return _describe(error.name or "")
    if isinstance(error, AttributeError):
        lacking = getattr(error, "obj", None)
        if isinstance(lacking, ModuleType):
            return _describe(lacking.__name__)
        kind = lacking if isinstance(lacking, type) else type(lacking)
        library = kind.__module__.partition(".")[0]
        return None if library in ("builtins", _OWN, asking) else _describe(library)
    if isinstance(error, TypeError) and _OTHER_ARGUMENTS.search(str(error)) and asking == _OWN:
        return _describe("")
    return None


def _get_place(error: BaseException) -> str:
    """The module whose line raised an exception, or called what raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))


def _describe(module: str) -> str:
    package = module.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", "")
    return f"the installed {package} {version}".rstrip() if package else "an installed library"
