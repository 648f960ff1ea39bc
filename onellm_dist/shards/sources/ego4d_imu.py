"""`onellm shards build ego4d-imu IN OUT`: two seconds of the camera wearer's motion with a narration (paper, Tab. 9).

IN holds recordings, raw (`v2/imu/<video_uid>.csv`) or as imu2clip's script leaves them (`<video_uid>.npy` with
`<video_uid>_timestamps.npy`, in `v2/processed_imu/`, `processed_imu/`, `imu/` or IN itself), and one of

- a list of windows, `[{video_uid, window_start, window_end, text}]` in seconds (the reference's window_idx_train.json);
  of a `text` that is a list, training takes one each epoch, as the reference;
- Ego4D's `narration.json`: a window of two seconds around each narration, not before the video's start.

Narrations are cleaned: `#C C ` and `#C` (the camera wearer) and `#O ` (another person) go, `#unsure` becomes "something".
Samples come video by video, so that each recording is read once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
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
    CutImuWindow,
    RecordingFiles,
    find_recording,
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
_GROUP = 1000
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


def clean_narration(text: str) -> str:
    """A narration without Ego4D's marks: `#C C picks #unsure` -> `picks something`."""
    return _UNSURE.sub("something", _MARK.sub("", text)).strip()


def plan(
    inputs: Path, *, seed: int, windows: Path | None, narrations: Path | None, passes: str, **_: Any
) -> DatasetDescription:
    """Windows by video, from either list.

    Raises:
        UsageError: neither list is there, or an option is wrong.
    """
    if passes not in ("1", "2", "both"):
        raise UsageError(
            f"passes={passes} is none of 1, 2, both.",
            "it says which narrators' texts are taken.",
            "choose one.",
        )
    if windows is not None and narrations is not None:
        raise UsageError(
            "both windows and narrations are given.",
            "each is a list of samples.",
            "give one of them.",
        )
    listed = None if narrations is not None else _first(inputs, windows, _USUAL_WINDOWS)
    if listed is not None:
        return DatasetDescription(
            ("imu",), _window_groups(inputs, listed), (f"windows of {listed}",)
        )
    told = _first(inputs, narrations, _USUAL_NARRATIONS)
    if told is None:
        raise UsageError(
            f"{inputs}: neither {_USUAL_WINDOWS[0]} nor {_USUAL_NARRATIONS[0]} there.",
            "they say which parts of the recordings are samples.",
            "name one: -o windows=FILE or -o narrations=FILE.",
        )
    key = "videos" if has_key(resolve_below(inputs, told), "videos") else None
    groups = split_rows(
        inputs,
        told,
        _GROUP,
        key=key,
        count=lambda row: {"train": sum(1 for _ in _narrated(row.value, passes)) or 1},
    )
    return DatasetDescription(
        ("imu",), groups, (f"windows of {_SECONDS:g} s around the narrations of {told}",)
    )


def _first(inputs: Path, chosen: Path | None, usual: tuple[str, ...]) -> str | None:
    names = usual if chosen is None else (str(chosen),)
    found = next((n for n in names if resolve_below(inputs, n).is_file()), None)
    if chosen is not None and found is None:
        raise UsageError(
            f"{chosen}: there is no such file.", "it lists the samples.", "check the path."
        )
    return found


def _window_groups(inputs: Path, name: str) -> Iterator[InputSplit]:
    """Windows sorted by video (0.5M of them: some 200 MB); a video's recording is then read by one process."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for number, row in enumerate(scan_rows(resolve_below(inputs, name))):
        uid = row.value.get("video_uid") if isinstance(row.value, dict) else None
        found.setdefault(uid if isinstance(uid, str) else "", []).append(
            (number, row.start, row.end)
        )
    for uid, rows in sorted(found.items()):
        for first in range(0, len(rows), _GROUP):
            some = rows[first : first + _GROUP]
            yield InputSplit(
                f"{name}:{uid}:{first}", {"windows": name, "rows": some}, count=len(some)
            )


def raw_samples(inputs: Path, description: SplitDescription, **options: Any) -> Iterator[RawSample]:
    """The group's windows."""
    if "windows" in description:
        return _from_windows(inputs, description, **options)
    return _from_narrations(inputs, description, **options)


def _from_windows(
    inputs: Path, description: SplitDescription, *, imu: Path | None, min_samples: int, **_: Any
) -> Iterator[RawSample]:
    last: tuple[str, RecordingFiles | None] | None = None  # a group's windows are of one video
    for item in read_rows_at(resolve_below(inputs, description["windows"]), description["rows"]):
        row, where, key = item.value, item.where, f"window-{item.number:07d}"
        uid, times = _window(row)
        if uid is None or times is None:
            yield RawSample(
                key,
                where,
                problem="unreadable row: no video_uid, window_start, window_end and text",
            )
            continue
        if last is None or last[0] != uid:
            last = uid, find_recording(inputs if imu is None else resolve_below(inputs, imu), uid)
        yield _raw_sample(last[1], key, where, uid, times, row["text"], min_samples)


def _window(row: Any) -> tuple[str | None, tuple[float, float] | None]:
    if not isinstance(row, dict) or not isinstance(row.get("video_uid"), str) or "text" not in row:
        return None, None
    try:
        return row["video_uid"], (float(row["window_start"]), float(row["window_end"]))
    except (KeyError, TypeError, ValueError):
        return None, None


def _raw_sample(
    found: RecordingFiles | None,
    key: str,
    where: str,
    uid: str,
    times: tuple[float, float],
    text: Any,
    min_samples: int,
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
        {"imu.npy": CutImuWindow(*found, *times, min_samples)},
        captions[0] if len(captions) == 1 else None,
        meta,
    )


def _narrated(video: Any, passes: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(pass, number in it, narration) of a video of narration.json."""
    for name in _PASSES:
        told = (
            video.get(name)
            if isinstance(video, dict) and (passes == "both" or name.endswith(passes))
            else None
        )
        listed = told.get("narrations") if isinstance(told, dict) else None
        for number, narration in enumerate(listed if isinstance(listed, list) else []):
            yield name, number, narration if isinstance(narration, dict) else {}


def _from_narrations(
    inputs: Path,
    description: SplitDescription,
    *,
    imu: Path | None,
    others: bool,
    passes: str,
    min_samples: int,
    **_: Any,
) -> Iterator[RawSample]:
    for item in read_rows(inputs, description):
        uid, video = item.key, item.value
        told = _narrated(video, passes)
        first = next(told, None)
        found = find_recording(inputs if imu is None else resolve_below(inputs, imu), uid)
        if first is None:
            yield RawSample(uid, f"{description['file']}[{uid}]", skip="a video without narrations")
            continue
        for name, number, narration in (first, *told):
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
                yield _raw_sample(
                    found, key, where, uid, (start, start + _SECONDS), text, min_samples
                )


SOURCE = Source(
    "ego4d-imu",
    "Ego4D's inertial recordings (csv, or imu2clip's npy), cut by a list of windows or around narrations",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "windows": Option(
            None, "the list of windows; IN/window_idx_train.json where it is there", Path
        ),
        "narrations": Option(
            None,
            "narration.json, to make windows of two seconds from; else IN/narration.json",
            Path,
        ),
        "imu": Option(None, "the folder of the recordings, if they do not lie in IN", Path),
        "passes": Option("both", "narrations: of the first narrator (1), the second (2), or both"),
        "others": Option(True, "narrations: keep those about another person (#O)", bool),
        "min_samples": Option(
            10,
            "samples below which a window is left out as bad; below 10 it always is, as in the reference",
            int,
        ),
    },
    licence="Ego4D licence agreement: no redistribution",
)
