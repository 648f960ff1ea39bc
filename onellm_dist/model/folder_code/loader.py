"""Imports of modules whose source texts stand in one file.

The text of this module opens `onellm_code.py` in a model's folder. Its classes and functions are
what `zipimport` is for a zip file: they let Python import the package's modules from `SOURCES`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Mapping
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import CodeType, ModuleType
from typing import Any

PACKAGE = "onellm_dist"
"""Name under which the modules import each other."""


class SourceImporter(InspectLoader):
    """Finds and loads the modules of one folder of the source texts.

    Args:
        package: full name of the package that stands for PACKAGE here.
        sources: module below PACKAGE, such as `model.upm`, to its source text.
        root: path of the file with the texts.
        folder: the folder that is searched, a package below PACKAGE; empty: PACKAGE itself.
    """

    def __init__(self, package: str, sources: Mapping[str, str], root: str, folder: str) -> None:
        self._package = package
        self._sources = sources
        self._root = root
        self._folder = folder

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module of this folder; None: it has no such module.

        Args:
            fullname: the module's full name.
            target: not used.
        """
        name = ".".join(filter(None, (self._folder, fullname.rpartition(".")[2])))
        if name not in self._sources and not self._is_folder(name):
            return None
        path = f"{self._root}/{name.replace('.', '/')}"
        is_package = self._is_folder(name)
        origin = f"{path}/__init__.py" if is_package else f"{path}.py"
        spec = spec_from_loader(fullname, self, origin=origin, is_package=is_package)
        if spec is not None:
            spec.has_location = True
            if is_package:
                spec.submodule_search_locations = [path]
        return spec

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """Name and whether it is a package, for every module of this folder (`pkgutil`).

        Args:
            prefix: put before each name.
        """
        start = f"{self._folder}." if self._folder else ""
        rest = (name.removeprefix(start) for name in self._sources if name.startswith(start))
        for name in sorted({part.partition(".")[0] for part in rest}):
            yield prefix + name, self._is_folder(start + name)

    def get_source(self, fullname: str) -> str:
        """The text of a module as it stands in PACKAGE; empty for a package without one.

        Args:
            fullname: the module's full name.
        """
        return self._sources.get(fullname.removeprefix(f"{self._package}."), "")

    def get_code(self, fullname: str) -> CodeType:
        """The module's code, with imports from PACKAGE changed into imports from here.

        Args:
            fullname: the module's full name.
        """
        origin = f"{self._root}/{fullname.removeprefix(f'{self._package}.').replace('.', '/')}.py"
        tree = ast.parse(self.get_source(fullname), origin)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                first, dot, rest = (node.module or "").partition(".")
                if first == PACKAGE:
                    node.module = f"{self._package}{dot}{rest}"
        return compile(tree, origin, "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        """Whether a module has modules below it.

        Args:
            fullname: the module's full name.
        """
        return self._is_folder(fullname.removeprefix(f"{self._package}."))

    def _is_folder(self, name: str) -> bool:
        return any(other.startswith(f"{name}.") for other in self._sources)


def install(module: dict[str, Any], sources: Mapping[str, str]) -> None:
    """Make a module a package that has all modules of the source texts.

    Args:
        module: the namespace of the file with the texts.
        sources: module below PACKAGE to its source text.
    """
    package, root = module["__name__"], module["__file__"]
    module["__path__"] = [root]
    if module["__spec__"] is not None:
        module["__spec__"].submodule_search_locations = [root]

    def open_folder(path: str) -> SourceImporter:
        if path != root and not path.startswith(f"{root}/"):
            raise ImportError(path)
        folder = path[len(root) + 1 :].replace("/", ".")
        return SourceImporter(package, sources, root, folder)

    sys.path_hooks.append(open_folder)
    sys.path_importer_cache.pop(root, None)
    importlib.invalidate_caches()


def load(module: dict[str, Any], name: str, attribute: str) -> Any:
    """A name of one of the modules.

    Args:
        module: the namespace of the file with the texts.
        name: module below PACKAGE.
        attribute: what to take of it.
    """
    return getattr(importlib.import_module(f"{module['__name__']}.{name}"), attribute)
