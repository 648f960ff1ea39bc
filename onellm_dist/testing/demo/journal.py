"""What a demo has done so far, on the disk: one that was ended goes on with the stage that it was in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from onellm_dist.common.errors import UsageError

JOURNAL = "demo.json"


@dataclass
class Journal:
    """The stages that ended.

    Attributes:
        out: the demo's folder.
        full: whether it is `onellm demo --full`.
        seconds: name of a stage that ended -> the seconds it took.
        killed: whether the kill that the demo shows was done.
    """

    out: Path
    full: bool
    seconds: dict[str, float] = field(default_factory=dict)
    killed: bool = False

    def ended(self, stage: str, seconds: float) -> None:
        """Take note that a stage ended."""
        self.seconds[stage] = seconds
        self.write()

    def write(self) -> None:
        """Put it on the disk, whole or not at all."""
        fields = {key: value for key, value in asdict(self).items() if key != "out"}
        partial = self.out / f".{JOURNAL}.new"
        partial.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out / JOURNAL)


def claim(out: Path, *, full: bool) -> Journal:
    """Make `out`, or take up the demo that was begun there.

    Raises:
        UsageError: `out` holds something else, or a demo of the other size.
    """
    path = out / JOURNAL
    if path.is_file():
        try:
            journal = Journal(out, **json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{path}: not a demo's record: {error}",
                "how far it was is not known.",
                f"remove {out}, or give another --out.",
            ) from None
        if journal.full != full:
            has, wanted = (
                ("--full", "the quick one") if journal.full else ("the quick demo", "--full")
            )
            raise UsageError(
                f"{out} holds {has}, and {wanted} was asked for",
                "their sizes differ.",
                "remove it, or give another folder with --out.",
            )
        return journal
    if out.exists() and any(out.iterdir()):
        raise UsageError(
            f"{out} is not empty",
            "the demo would mix with what is there.",
            "remove it, or give another folder with --out.",
        )
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out, full)
    journal.write()
    return journal
