"""The fenced blocks of the documentation, and how each is marked."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("bash", "python")
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n+)?^(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n"
    r"(?P<code>.*?)^[ ]*```",
    re.M | re.S,
)
SETUP = {
    "make demo": "half an hour; tests/testing/demo walks it",
    "make test": "it runs this test",
    "make setup": "it made the environment that this test runs in",
    "source .venv/bin/activate": "the environment is that of this test",
    "git clone URL onellm_dist && cd onellm_dist": "the checkout is that of this test",
}
"""Command, as it stands in a block that is run, to why it is left out there."""
COMMAND = re.compile(
    r"(?:\$ )?(?:onellm|make|pip|python3?|source|git|srun|sbatch|deepspeed|torchrun|touch) \S"
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None
    """Why it is not run, where it is not."""


def pages() -> list[str]:
    """Every page that people read, by path below the checkout."""
    listed = [
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "shards/README.md")
    ]
    listed += [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "ds_configs/README.md"]
    return [str(path.relative_to(ROOT)) for path in listed if path.is_file()]


def blocks(page: str) -> list[Block]:
    """The blocks of a page that hold commands or Python."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["language"] not in LANGUAGES:
            continue
        indent = len(match["indent"])
        code = "".join(line[indent:] for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], code, match["reason"]))
    return found


def commands_without_language(page: str) -> list[int]:
    """Lines of a page that hold commands in a block whose fence names no language."""
    language: str | None = None
    found = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"[ ]*```(\w*)", line)
        if fence:
            language = None if language is not None else fence[1]
        elif language == "" and COMMAND.match(line.strip()):
            found.append(number)
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each `onellm` command of a shell block, whatever starts it."""
    lines = block.code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if "onellm" not in line or line.lstrip().startswith("#"):
            continue
        words = shlex.split(line, comments=True)
        if "onellm" in words:
            found.append(words[words.index("onellm") + 1 :])
    return found


def strip_comment(line: str) -> str:
    """A line of a shell block without the comment behind it."""
    return re.sub(r"\s+# .*", "", line).rstrip()


def script(block: Block) -> str:
    """A shell block without what is set up already."""
    kept = [line for line in block.code.splitlines() if strip_comment(line) not in SETUP]
    return "\n".join(kept) + "\n"
