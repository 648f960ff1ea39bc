"""What a demo has done so far, on disk: an interrupted demo resumes with its unfinished stage."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import write_atomic

JOURNAL = "demo.json"


@dataclass
class Journal:
    """The finished stages of a demo.

    Attributes:
        out: folder of the demo.
        full: whether it is `onellm demo --full`.
        seconds: name of each finished stage, and the seconds it took.
        killed: whether the kill that the demo shows has taken place.
    """

    out: Path
    full: bool
    seconds: dict[str, float] = field(default_factory=dict)
    killed: bool = False

    def record_stage(self, stage: str, seconds: float) -> None:
        """Record on disk that a stage has finished."""
        self.seconds[stage] = seconds
        self.write()

    def write(self) -> None:
        """Write the journal to disk."""
        fields = {key: value for key, value in asdict(self).items() if key != "out"}
        write_atomic(self.out / JOURNAL, json.dumps(fields, indent=1) + "\n")


def open_journal(out: Path, *, full: bool) -> Journal:
    """Open the journal of the demo in `out`, or start one in an empty folder.

    Args:
        out: folder of the demo; made if missing.
        full: whether the demo is `onellm demo --full`.

    Raises:
        UsageError: `out` holds something else, or a demo of the other size.
    """
    path = out / JOURNAL
    if path.is_file():
        return _read_journal(path, full=full)
    if out.exists() and any(out.iterdir()):
        raise UsageError(
            f"{out} is not empty",
            "the demo's files would be mixed with what is there.",
            "remove it, or use another folder with --out.",
        )
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out, full)
    journal.write()
    return journal


def _read_journal(path: Path, *, full: bool) -> Journal:
    out = path.parent
    try:
        journal = Journal(out, **json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: not a demo's record: {error}",
            "it is not known how far the demo was.",
            f"remove {out}, or use another --out.",
        ) from None
    if journal.full != full:
        names = {True: "--full", False: "the quick demo"}
        raise UsageError(
            f"{out} holds {names[journal.full]}, and {names[full]} was asked for",
            "their sizes differ.",
            "remove it, or use another folder with --out.",
        )
    return journal
