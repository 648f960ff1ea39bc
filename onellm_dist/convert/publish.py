"""Is a model's folder ready for the Hub? Checks it, and says how to upload it; uploads nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from onellm_dist.common.checksums import check_folder
from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.model.card import CARD, needs_llama_licence
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.folder_code.files import CONFIG_MAP, build_files
from onellm_dist.model.presets import check_directory

Level = Literal["ok", "missing", "wrong"]
_LOADERS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npz", ".joblib")
"""Suffixes of files that can run code when they are loaded, or that hold weights another way."""
_CODE = (".py", ".pyc", ".pyd", ".pyw", ".so")
_TEXTS = (".json", ".md", ".txt", ".yaml", ".yml", ".jinja")
_RESULTS = re.compile(r"^#+\s.*\b(results|evaluation|benchmarks)\b", re.IGNORECASE | re.MULTILINE)
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|scratch|mnt|gpfs|lustre|work)/[\w.-]+/")
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,})"
    r"|://[^/\s:@]+:[^/\s@]+@"
)
"""Keys of the Hub, OpenAI, AWS and GitHub, and passwords in URLs."""
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
LOAD_SECONDS = 3600
"""Longest that loading a model may take."""


@dataclass(frozen=True)
class PublicationFinding:
    """What a check found.

    Attributes:
        level: `ok`; `missing`: better added first; `wrong`: must not be published so.
        what: in words.
    """

    level: Level
    what: str


def check_publication(folder: Path, *, load: bool = True) -> list[PublicationFinding]:
    """Check a model's folder.

    Args:
        folder: a onellm directory.
        load: whether to load it where this package cannot be imported; takes the model's memory.

    Raises:
        UsageError: it is not an onellm directory, or a file was damaged.
    """
    check_directory(folder)
    check_folder(folder)
    try:
        config = OneLLMConfig.from_pretrained(folder)
    except Exception as error:  # whatever a config of any content makes transformers raise
        raise UsageError(
            f"{folder}/config.json: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "the model cannot be built.",
            "restore the config.json of these weights.",
        ) from None
    findings = [
        *_check_files(folder),
        *_check_card(folder),
        *_check_licence(folder, config),
        *_check_text(folder),
        *_check_code(folder),
    ]
    if load and not any(finding.level == "wrong" for finding in findings):
        findings.append(_check_load(folder))
    return findings


def make_upload_command(folder: Path, repository: str) -> str:
    """The command that uploads a folder.

    Args:
        folder: the folder.
        repository: `OWNER/NAME`.

    Raises:
        UsageError: it does not name a repository.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(
            f"--repo {repository}", "it is not the name of a repository.", "give OWNER/NAME."
        )
    return f"hf upload {shlex.quote(repository)} {shlex.quote(str(folder))} . --repo-type model"


def _check_files(folder: Path) -> Iterator[PublicationFinding]:
    """Weights are safetensors alone, and nothing else lies there."""
    strange = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            yield PublicationFinding("wrong", f"{name} is a link: what it names would be uploaded")
        elif path.suffix.lower() in _LOADERS:
            yield PublicationFinding(
                "wrong", f"{name}: only safetensors is loaded without running code"
            )
        elif path.name.startswith("."):
            yield PublicationFinding("wrong", f"{name} is hidden: remove it")
        else:
            continue
        strange += 1
    tensors, _ = read_folder(folder)
    if not strange:
        yield PublicationFinding(
            "ok", f"{format_count(len(tensors), 'tensor')}, in safetensors files alone"
        )


def _check_card(folder: Path) -> Iterator[PublicationFinding]:
    """The card has what the Hub and its readers need."""
    path = folder / CARD
    if not path.is_file():
        yield PublicationFinding(
            "wrong", f"there is no {CARD}: `onellm convert` writes a model card"
        )
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    head = _read_front_matter(text)
    if head is None:
        yield PublicationFinding(
            "wrong", f"{CARD} does not begin with YAML between two lines `---`"
        )
        return
    if not head.get("license"):
        yield PublicationFinding("wrong", f"{CARD} names no license")
    elif head["license"] == "other" and not (head.get("license_name") and head.get("license_link")):
        yield PublicationFinding(
            "missing", f"{CARD}: license `other` needs license_name and license_link"
        )
    if not head.get("datasets"):
        yield PublicationFinding("missing", f"{CARD} names no datasets (`datasets:`)")
    if not head.get("base_model"):
        yield PublicationFinding(
            "missing", f"{CARD} does not name the LLM it came from (`base_model:`)"
        )
    if "THIS_DIRECTORY" in text:
        yield PublicationFinding(
            "missing", f"{CARD} says THIS_DIRECTORY where the model's name belongs"
        )
    if not head.get("model-index") and not _RESULTS.search(text):
        yield PublicationFinding(
            "missing", f"{CARD} has no figures of an evaluation (heading: Results)"
        )
    yield PublicationFinding("ok", f"{CARD} is a model card")


def _read_front_matter(text: str) -> dict[str, Any] | None:
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        found = yaml.safe_load(parts[1])
    except (yaml.YAMLError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _check_licence(folder: Path, config: OneLLMConfig) -> Iterator[PublicationFinding]:
    """LLaMA-2's licence and its Notice file must go with its weights."""
    if not needs_llama_licence(config):
        return
    names = [path.name.lower() for path in folder.iterdir()]
    for what in ("License", "Notice"):
        if not any(name.startswith(what.lower()) for name in names):
            yield PublicationFinding(
                "missing",
                f"there is no {what} file: LLaMA-2's licence asks for it, if the LLM's "
                "weights are Meta's",
            )


def _check_text(folder: Path) -> Iterator[PublicationFinding]:
    """A template, and no secrets or paths of this machine."""
    if not (folder / "chat_template.jinja").is_file():
        yield PublicationFinding(
            "missing",
            "there is no chat_template.jinja: say in the card in which text format the model was "
            "trained",
        )
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in _TEXTS or path.name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        name = path.relative_to(folder).as_posix()
        if _SECRET.search(text):
            yield PublicationFinding("wrong", f"{name} seems to have a password or key in it")
        if found := _MACHINE_PATH.search(text):
            yield PublicationFinding("missing", f"{name} has a path of a machine: {found[0]}...")


def _check_code(folder: Path) -> Iterator[PublicationFinding]:
    """The folder's code is there, is this package's, and nothing names or adds other code."""
    wanted = build_files()
    lacking = [name for name in wanted if not (folder / name).is_file()]
    if lacking:
        yield PublicationFinding(
            "wrong",
            f"there is no {lacking[0]}: without onellm_dist the model does not load; save it again",
        )
    changed = [
        name
        for name, text in wanted.items()
        if name not in lacking and (folder / name).read_bytes() != text.encode()
    ]
    if changed:
        yield PublicationFinding(
            "wrong",
            f"{', '.join(changed)}: not the code of this onellm_dist, so it is not run here; save "
            "the model again",
        )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in _CODE and name not in wanted:
            yield PublicationFinding("wrong", f"{name}: code that onellm_dist did not write")
        elif path.suffix == ".json" and path.name != "tokenizer.json" and _names_other_code(path):
            yield PublicationFinding("wrong", f"{name} names code of others (auto_map)")


def _names_other_code(path: Path) -> bool:
    """Whether a file has an `auto_map` with anything but this package's classes, at any depth."""
    try:
        waiting = [json.loads(path.read_bytes())]
    except (OSError, ValueError, RecursionError):  # transformers cannot read it either
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found = value.get("auto_map") or {}
            own = isinstance(found, dict) and all(
                CONFIG_MAP.get(name) == target for name, target in found.items()
            )
            if not own:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _check_load(folder: Path) -> PublicationFinding:
    """Load it in a process that cannot import this package."""
    # As text: a script's own folder comes first in its imports, and this one has an inspect.py.
    script = Path(__file__).with_name("load_alone.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as modules:
        environment = {
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "HF_MODULES_CACHE": modules,
            "HF_HUB_OFFLINE": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-c", script, str(folder.resolve())],
                cwd=modules,
                capture_output=True,
                text=True,
                timeout=LOAD_SECONDS,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return PublicationFinding("wrong", f"it did not load within {LOAD_SECONDS} s")
    if done.returncode == 0 and "loaded 2" in done.stdout:
        return PublicationFinding(
            "ok", "it loads by the Auto classes without onellm_dist, and answers"
        )
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return PublicationFinding("wrong", f"it does not load without onellm_dist: {said}")
