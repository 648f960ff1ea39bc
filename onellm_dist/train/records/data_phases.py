"""`samples/data_phases.json` and `samples/datasets.json`: what the stream of a run is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from onellm_dist.common.files import write_atomic
from onellm_dist.common.run_files import DATA_PHASES, DATASETS
from onellm_dist.data.phases import DataPhase


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
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    phases = [data_phase.to_json() for data_phase in data_phases]
    write_atomic(folder / DATA_PHASES, json.dumps(phases, indent=1))
    write_atomic(path, json.dumps({**known, **datasets}, indent=1))
