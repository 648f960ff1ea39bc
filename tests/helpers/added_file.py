"""A file that a test adds to a folder of the package, for what is found by being there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def added_file(
    package: ModuleType, name: str, code: str, folder: Path, forget: Callable[[], object]
) -> Iterator[None]:
    """The module `name` of the package lies in `folder`, which stands last on the package's path.

    `forget` makes the registry look again, within the context and after it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    before = package.__path__
    package.__path__ = [*before, str(folder)]
    forget()
    try:
        yield
    finally:
        package.__path__ = before
        vars(package).pop(name, None)
        sys.modules.pop(f"{package.__name__}.{name}", None)
        forget()
