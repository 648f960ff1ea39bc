"""`onellm shards build ego4d-imu IN OUT`: two seconds of the camera wearer's motion, narrated.

This is the paper's IMU data (Tab. 9). IN holds recordings, raw (`v2/imu/<video_uid>.csv`) or as
imu2clip's script leaves them (`<video_uid>.npy` with `<video_uid>_timestamps.npy`, in
`v2/processed_imu/`, `processed_imu/`, `imu/` or IN itself), and one of

- a list of windows, `[{video_uid, window_start, window_end, text}]` in seconds (the reference's
  window_idx_train.json). If `text` is a list, training takes one of it in each epoch, as the
  reference does;
- Ego4D's `narration.json`: a window of two seconds around each narration, not before the video's
  start.

Narrations are cleaned: `#C C ` and `#C` (the camera wearer) and `#O ` (another person) are removed,
and `#unsure` becomes "something". Samples come video by video, so that each recording is read once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities.io.imu import UNIT_KEYS
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.conversations import make_caption_turns
from onellm_dist.shards.sources.readers.imu_windows import (
    IMU_UNITS_OPTION,
    CutImuWindow,
    RecordingFiles,
    find_recording,
    parse_imu_units,
)
from onellm_dist.shards.sources.readers.json_stream import (
    has_key,
    read_rows,
    read_rows_at,
    scan_rows,
    split_rows,
)
from onellm_dist.shards.sources.readers.media_files import resolve_below

_SECONDS = 2.0
_SPLIT_ROWS = 1000
_USUAL_WINDOWS = ("window_idx_train.json", "v2/window_idx_train.json")
_USUAL_NARRATIONS = (
    "narration.json",
    "v2/annotations/narration.json",
    "annotations/narration.json",
    "v2/narration.json",
)
_PASSES = ("narration_pass_1", "narration_pass_2")
_MARK = re.compile(r"#[CO]\b\s*(?:C(?:\s+|$))?", re.IGNORECASE)
_UNSURE = re.compile(r"#unsure", re.IGNORECASE)


class _CutOptions(NamedTuple):
    """How windows are cut."""

    min_samples: int
    units: tuple[tuple[str, str], ...]


def clean_narration(text: str) -> str:
    """Remove Ego4D's marks from a narration: `#C C picks #unsure` becomes `picks something`."""
    return _UNSURE.sub("something", _MARK.sub("", text)).strip()


def plan(
    inputs: Path,
    *,
    seed: int,
    windows: Path | None,
    narrations: Path | None,
    passes: str,
    imu_units: str | None,
    **_: Any,
) -> DatasetDescription:
    """List windows by video, from either list.

    Raises:
        UsageError: neither list exists, or an option is wrong.
    """
    parse_imu_units(imu_units)
    if passes not in ("1", "2", "both"):
        raise UsageError(
            f"passes={passes} is none of 1, 2, both.",
            "it says which narrators' texts are taken.",
            "choose one.",
        )
    if windows is not None and narrations is not None:
        raise UsageError(
            "both windows and narrations are named.",
            "each is a list of samples.",
            "name one of them.",
        )
    listed = None if narrations is not None else _find_list(inputs, windows, _USUAL_WINDOWS)
    if listed is not None:
        return DatasetDescription(
            ("imu",), _split_windows(inputs, listed), (f"windows of {listed}",)
        )
    narration_file = _find_list(inputs, narrations, _USUAL_NARRATIONS)
    if narration_file is None:
        raise UsageError(
            f"{inputs} has neither {_USUAL_WINDOWS[0]} nor {_USUAL_NARRATIONS[0]}.",
            "they say which parts of the recordings are samples.",
            "name one: -o windows=FILE or -o narrations=FILE.",
        )
    key = "videos" if has_key(resolve_below(inputs, narration_file), "videos") else None
    splits = split_rows(
        inputs,
        narration_file,
        _SPLIT_ROWS,
        key=key,
        count=lambda row: {"train": sum(1 for _ in _list_narrations(row.value, passes)) or 1},
    )
    return DatasetDescription(
        ("imu",), splits, (f"windows of {_SECONDS:g} s around the narrations of {narration_file}",)
    )


def _find_list(inputs: Path, chosen: Path | None, usual: tuple[str, ...]) -> str | None:
    names = usual if chosen is None else (str(chosen),)
    found = next((n for n in names if resolve_below(inputs, n).is_file()), None)
    if chosen is not None and found is None:
        raise UsageError(
            f"{chosen}: there is no such file.", "it lists the samples.", "check the path."
        )
    return found


def _split_windows(inputs: Path, name: str) -> Iterator[InputSplit]:
    """Input splits of windows sorted by video, so that one process reads a video's recording.

    This takes about 200 MB for 0.5M windows.
    """
    found: dict[str, list[tuple[int, int, int]]] = {}
    for number, row in enumerate(scan_rows(resolve_below(inputs, name))):
        uid = row.value.get("video_uid") if isinstance(row.value, dict) else None
        found.setdefault(uid if isinstance(uid, str) else "", []).append(
            (number, row.start, row.end)
        )
    for uid, rows in sorted(found.items()):
        for first in range(0, len(rows), _SPLIT_ROWS):
            some = rows[first : first + _SPLIT_ROWS]
            yield InputSplit(
                f"{name}:{uid}:{first}", {"windows": name, "rows": some}, count=len(some)
            )


def raw_samples(inputs: Path, description: SplitDescription, **options: Any) -> Iterator[RawSample]:
    """Read the samples of one input split."""
    if "windows" in description:
        return _read_windows(inputs, description, **options)
    return _read_narrations(inputs, description, **options)


def _read_windows(
    inputs: Path,
    description: SplitDescription,
    *,
    imu: Path | None,
    min_samples: int,
    imu_units: str | None,
    **_: Any,
) -> Iterator[RawSample]:
    cut = _CutOptions(min_samples, parse_imu_units(imu_units))
    last: tuple[str, RecordingFiles | None] | None = (
        None  # the windows of an input split are of one video
    )
    for item in read_rows_at(resolve_below(inputs, description["windows"]), description["rows"]):
        row, where, key = item.value, item.where, f"window-{item.number:07d}"
        uid, times = _parse_window(row)
        if uid is None or times is None:
            yield RawSample(
                key,
                where,
                problem="unreadable row: no video_uid, window_start, window_end and text",
            )
            continue
        if last is None or last[0] != uid:
            last = uid, find_recording(inputs if imu is None else resolve_below(inputs, imu), uid)
        yield _make_raw_sample(last[1], key, where, uid, times, row["text"], cut)


def _parse_window(row: Any) -> tuple[str | None, tuple[float, float] | None]:
    if not isinstance(row, dict) or not isinstance(row.get("video_uid"), str) or "text" not in row:
        return None, None
    try:
        return row["video_uid"], (float(row["window_start"]), float(row["window_end"]))
    except (KeyError, TypeError, ValueError):
        return None, None


def _make_raw_sample(
    found: RecordingFiles | None,
    key: str,
    where: str,
    uid: str,
    times: tuple[float, float],
    text: Any,
    cut: _CutOptions,
) -> RawSample:
    texts = text if isinstance(text, list) and text else [text]
    if not all(isinstance(t, str) for t in texts):
        return RawSample(key, where, problem=f"caption is not text: a {type(text).__name__}")
    if found is None:
        return RawSample(key, where, problem=f"missing file: no recording of video {uid}")
    captions = [clean_narration(t) for t in texts]
    meta: dict[str, Any] = {
        "video_uid": uid,
        "window_start": times[0],
        "window_end": times[1],
        "conversations": make_caption_turns("imu", captions[0]),
    }
    if len(captions) > 1:
        meta["caption"] = captions
    return RawSample(
        key,
        where,
        {"imu.npy": CutImuWindow(*found, *times, cut.min_samples, cut.units)},
        captions[0] if len(captions) == 1 else None,
        meta,
    )


def _list_narrations(video: Any, passes: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield (pass, number in the pass, narration) for a video of narration.json."""
    for name in _PASSES:
        written = (
            video.get(name)
            if isinstance(video, dict) and (passes == "both" or name.endswith(passes))
            else None
        )
        listed = written.get("narrations") if isinstance(written, dict) else None
        for number, narration in enumerate(listed if isinstance(listed, list) else []):
            yield name, number, narration if isinstance(narration, dict) else {}


def _read_narrations(
    inputs: Path,
    description: SplitDescription,
    *,
    imu: Path | None,
    others: bool,
    passes: str,
    min_samples: int,
    imu_units: str | None,
    **_: Any,
) -> Iterator[RawSample]:
    cut = _CutOptions(min_samples, parse_imu_units(imu_units))
    for item in read_rows(inputs, description):
        uid, video = item.key, item.value
        narrations = _list_narrations(video, passes)
        first = next(narrations, None)
        found = find_recording(inputs if imu is None else resolve_below(inputs, imu), uid)
        if first is None:
            yield RawSample(uid, f"{description['file']}[{uid}]", skip="a video without narrations")
            continue
        for name, number, narration in (first, *narrations):
            where = f"{description['file']}[{uid}][{name}][{number}]"
            key = f"{uid}-{name[-1]}-{number:05d}"
            text, second = narration.get("narration_text"), narration.get("timestamp_sec")
            if not isinstance(text, str) or not isinstance(second, (int, float)):
                yield RawSample(
                    key, where, problem="unreadable row: no narration_text and timestamp_sec"
                )
            elif found is None:
                yield RawSample(key, where, skip="a video without inertial recording")
            elif not others and re.search(r"#O\b", text):
                yield RawSample(key, where, skip="about another person (#O)")
            else:
                start = max(0.0, float(second) - _SECONDS / 2)
                yield _make_raw_sample(found, key, where, uid, (start, start + _SECONDS), text, cut)


SOURCE = Source(
    "ego4d-imu",
    "Ego4D's inertial recordings (csv, or imu2clip's npy), cut by a list of windows or around "
    "narrations",
    plan=plan,
    raw_samples=raw_samples,
    own_keys=dict.fromkeys(UNIT_KEYS, "imu_units"),
    options={
        "windows": Option(
            None, "the list of windows; default: IN/window_idx_train.json if it exists", Path
        ),
        "narrations": Option(
            None,
            "narration.json, to make windows of two seconds from; default: IN/narration.json",
            Path,
        ),
        "imu": Option(None, "the folder of the recordings, if it is not IN", Path),
        "imu_units": IMU_UNITS_OPTION,
        "passes": Option("both", "narrations of the first narrator (1), the second (2), or both"),
        "others": Option(True, "whether to keep narrations about another person (#O)", bool),
        "min_samples": Option(
            10,
            "samples below which a window is bad; below 10 it always is, as in the reference",
            int,
        ),
    },
    licence="Ego4D licence agreement: no redistribution",
)
