"""The Python files of a saved model, made from this package's own sources.

transformers runs them with `trust_remote_code=True`, where this package is not installed.
`onellm_code.py` has the text of every module that config, model and processor import, word for
word, and three short files name the classes in it. So a folder's code is the code that wrote it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from onellm_dist.common.source_texts import list_modules, read_source
from onellm_dist.modalities import get_modality

PACKAGE = "onellm_dist"
_HERE = __name__.removesuffix(".model.folder_code.files")
"""The package itself, or the file in a model's folder that stands for it."""
_FACADES = ("", "model")
"""Packages whose `__init__` only gathers names, and would import all of the package."""
_CLASSES = {
    "configuration_onellm": ("model.configuration", "OneLLMConfig"),
    "modeling_onellm": ("model.onellm", "OneLLMForConditionalGeneration"),
    "processing_onellm": ("model.processing.processor", "OneLLMProcessor"),
}
"""File to (module, class) that it names."""
_LOADER = "model.folder_code.loader"
_MODEL = "modeling_onellm.OneLLMForConditionalGeneration"
CONFIG_MAP = {
    "AutoConfig": "configuration_onellm.OneLLMConfig",
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
    "AutoProcessor": "processing_onellm.OneLLMProcessor",
}
"""`auto_map` of config.json: Auto class to file and class."""
PROCESSOR_MAP = {"AutoProcessor": CONFIG_MAP["AutoProcessor"]}
"""`auto_map` of processor_config.json."""
_LIBRARIES = ("av", "jinja2", "numpy", "PIL", "scipy", "soundfile")
"""What the code needs besides torch and transformers, for transformers' message if one is missing.
"""


def write_code(folder: Path) -> None:
    """Write the Python files of a model.

    Args:
        folder: the model's folder.

    Raises:
        OSError: a file cannot be written.
    """
    for name, text in build_files().items():
        (folder / name).write_text(text, encoding="utf-8")


def has_all_modalities(names: Iterable[str]) -> bool:
    """Whether the code of these modalities is this package's own, and can be given away.

    Args:
        names: modalities of a model.
    """
    own = f"{_HERE}.modalities."
    return all(type(get_modality(name)).__module__.startswith(own) for name in names)


@cache
def build_files() -> Mapping[str, str]:
    """Name to text of every Python file."""
    files = {
        f"{name}.py": _FILE.format(name=name, module=module, cls=cls)
        for name, (module, cls) in _CLASSES.items()
    }
    return {**files, "onellm_code.py": _join(read_sources())}


def read_sources() -> dict[str, str]:
    """Module below the package to its text, for every module that the classes may import.

    Raises:
        ValueError: a module imports in a way that could not be redirected.
    """
    found: dict[str, str] = {}
    modalities = list_modules(f"{_HERE}.modalities")
    waiting = [name.removeprefix(f"{_HERE}.") for name in modalities]
    waiting += [_LOADER, *(module for module, _ in _CLASSES.values())]
    while waiting:
        name = waiting.pop()
        if name in found or name in _FACADES or (text := read_source(f"{_HERE}.{name}")) is None:
            continue
        found[name] = text
        waiting += _list_imports(name, text)
    return dict(sorted(found.items()))


def _list_imports(name: str, text: str) -> Iterator[str]:
    """Modules below the package that a module imports, but for those of TYPE_CHECKING alone."""
    parent = name.rpartition(".")[0]
    if parent:
        yield parent
    for node in _walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(
            alias.name.split(".")[0] == PACKAGE for alias in node.names
        ):
            raise ValueError(f"{name} has `import {PACKAGE}`; write `from {PACKAGE}... import`")
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != PACKAGE:
            continue
        module = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
        if module in _FACADES:
            raise ValueError(f"{name} imports from {node.module}, which is not given away")
        yield module
        for alias in node.names if _is_package(module) else ():
            yield f"{module}.{alias.name}"  # where it is a module of its own


def _is_package(module: str) -> bool:
    spec = find_spec(f"{_HERE}.{module}")
    return spec is not None and spec.submodule_search_locations is not None


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):  # holds no statement
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _walk(node)


def _join(sources: Mapping[str, str]) -> str:
    """The text of onellm_code.py."""
    loader = sources[_LOADER]
    rest = loader.split("from __future__ import annotations\n", 1)[1]
    texts = "".join(f"SOURCES[{name!r}] = {_quote(text)}\n" for name, text in sources.items())
    return f"{_HEAD}{rest}\n\nSOURCES: dict[str, str] = {{}}\n{texts}{_END}"


def _quote(text: str) -> str:
    """A text as a literal that people can read."""
    quoted = f"r'''{text}'''"
    if "'''" not in text and text.endswith("\n") and ast.literal_eval(quoted) == text:
        return quoted
    return repr(text)


# transformers looks for lines that begin with an import from a file beside it, in this text too.
_FILE = "\n".join(
    [
        '"""{cls} for transformers\' `trust_remote_code=True`; onellm_code.py has the code."""',
        "",
        "from .onellm_code import load_class",
        "",
        "{cls} = load_class({module!r}, {cls!r})",
        "",
    ]
)
_HEAD = f'''"""The code of this model: modules of {PACKAGE} (Apache-2.0), word for word.

Written with the model, for machines where {PACKAGE} is not installed. Do not edit.
"""

from __future__ import annotations

{"".join(f"import {name}" + chr(10) for name in sorted(_LIBRARIES, key=str.lower))}'''
_END = '''
install(globals(), SOURCES)


def load_class(module: str, name: str) -> Any:
    """A class of the code."""
    return load(globals(), module, name)
'''
