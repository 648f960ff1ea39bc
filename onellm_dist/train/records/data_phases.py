"""`samples/data_phases.json` and `samples/datasets.json`: what the stream of a run is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import DATA_PHASES, DATASETS
from onellm_dist.data.phases import DataPhase, parse_data_phases

log = get_logger(__name__)


def write_data_phases(
    folder: Path, data_phases: Sequence[DataPhase], datasets: Mapping[str, str]
) -> None:
    """Replace `data_phases.json`, and add to `datasets.json`, durably. Rank 0 calls it.

    The files are for people and for `onellm samples`; a resume reads the copy in its checkpoint.

    Args:
        folder: `RUN_DIR/samples`.
        data_phases: the data phases of the run so far.
        datasets: dataset -> path or URL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / DATASETS
    known = _read_known(path)
    phases = [data_phase.to_json() for data_phase in data_phases]
    write_atomic(folder / DATA_PHASES, json.dumps(phases, indent=1))
    write_atomic(path, json.dumps({**known, **datasets}, indent=1))


def _read_known(path: Path) -> dict[str, str]:
    """The datasets that are recorded; a damaged file is kept under another name."""
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        known = None
    if isinstance(known, dict) and all(isinstance(text, str) for text in known.values()):
        return known
    kept = path.with_suffix(".damaged")
    path.replace(kept)
    log.warning("%s is damaged; it is kept as %s, and written again", path, kept.name)
    return {}


def read_data_phases(folder: Path) -> list[DataPhase]:
    """Read `data_phases.json`.

    Args:
        folder: `RUN_DIR/samples`.

    Raises:
        FileNotFoundError: there is none.
        OneLLMError: it is damaged.
    """
    path = folder / DATA_PHASES
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OneLLMError(
            f"{path}: damaged: {error}",
            "the samples of the run are computed from it.",
            "restore it from a copy; a start of the run writes it again.",
        ) from None
    found = parse_data_phases(raw, str(path))
    if not found:
        raise OneLLMError(
            f"{path}: damaged: it has no data phase",
            "the samples of the run are computed from it.",
            "restore it from a copy; a start of the run writes it again.",
        )
    return found
