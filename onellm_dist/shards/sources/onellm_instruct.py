"""`onellm shards build onellm-instruct IN OUT -o modality=NAME`: OneLLM's own instruction data.

IN is `InstructionTuning/` of csuhan/OneLLM_InstructionTuning, or the folder that contains it. All
samples of a dataset have the same modalities, so each of image, text, video, audio, point, depth,
normal, imu and fmri is a dataset of its own: nine builds, recipes shards/onellm_instruct_*.yaml.
Rows are {id, image, conversations}, where `image` is the path of any medium. Depth and normal add
`depth_image` and `normal_image`; IMU has `imu_path, video_uid, window_start, window_end`; the rows
of text have no medium.

Known defects of these files, and what is done about them:

- Paths start at `InstructionTuning/`, while the documentation puts that below `datasets/`. A path
  is searched as it is and from after `InstructionTuning/`, in IN and in IN/InstructionTuning.
- The reference reads point clouds from 6 x N `.pt` files, its documentation names `8192_npy`.
  Whichever exists is taken, as [N, 6].
- MSR-VTT's test videos are in the reference's training list. They are left out unless
  `include_test` is true.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.modalities.io.imu import UNIT_KEYS
from onellm_dist.shards.format.media import LISTED, make_numbered_parts
from onellm_dist.shards.format.names import TEXT_ONLY
from onellm_dist.shards.sources.base import (
    BadSampleError,
    DatasetDescription,
    Media,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    MediaNotFetchedError,
    find_media_folders,
    read_raw_samples,
    require_text,
)
from onellm_dist.shards.sources.readers.clouds import TensorCloud
from onellm_dist.shards.sources.readers.conversations import clean_turns, require_conversation
from onellm_dist.shards.sources.readers.fmri import MeanOfRepetitions
from onellm_dist.shards.sources.readers.imu_windows import (
    IMU_UNITS_OPTION,
    CutImuWindow,
    find_recording,
    parse_imu_units,
)
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows, split_rows
from onellm_dist.shards.sources.readers.media_files import find_first_file, require_one_file
from onellm_dist.shards.sources.readers.media_rows import check_tags
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing

_ROWS = 1000
_ROOT = "InstructionTuning"
_MIN_SAMPLES = 10
"""Least samples of an IMU window, as in the reference."""


class _InstructionFile(NamedTuple):
    """A file of the tree."""

    name: str
    modality: str
    test: bool = False
    """Whether the file is a benchmark's test split."""


FILES = (
    _InstructionFile("audio/audiocap_train.json", "audio"),
    _InstructionFile("audio/audio_conversation.json", "audio"),
    _InstructionFile("depth_normal/llava_instruct_50k_depth.json", "depth"),
    _InstructionFile("depth_normal/llava_instruct_50k_normal.json", "normal"),
    _InstructionFile("fmri/fmri_fixed_train.json", "fmri"),
    _InstructionFile("image/cococap_train.json", "image"),
    _InstructionFile("image/llava_v1_5_mix665k_image.json", "image"),
    _InstructionFile("image/llava_v1_5_mix665k_text.json", TEXT_ONLY),
    _InstructionFile("imu/imu_fixed_50k.json", "imu"),
    _InstructionFile("point/pointllm_70k.json", "point"),
    _InstructionFile("video/msrvtt_cap_trainval.json", "video"),
    _InstructionFile("video/msrvtt_cap_test.json", "video", test=True),
    _InstructionFile("video/msrvtt_vqa_train.json", "video"),
    _InstructionFile("video/msrvtt_vqa_val.json", "video"),
    _InstructionFile("video/msrvtt_vqa_test.json", "video", test=True),
    _InstructionFile("video/video_complex_reasoning_10k.json", "video"),
    _InstructionFile("video/video_conversation_10k.json", "video"),
    _InstructionFile("video/video_detail_10k.json", "video"),
)
"""The files of the tree; a training run of the reference reads them all."""
_MODALITIES = tuple(dict.fromkeys(f.modality for f in FILES))


def plan(
    inputs: Path,
    *,
    seed: int,
    modality: str | None,
    files: str | None,
    media: Path | None,
    include_test: bool,
    imu_units: str | None,
    missing: str,
    listed: bool,
) -> DatasetDescription:
    """Divide the files of one modality into ranges of rows.

    Raises:
        UsageError: no modality is chosen, none of its files exists, or an option is wrong.
    """
    check_missing(missing)
    parse_imu_units(imu_units)
    if modality not in _MODALITIES:
        raise UsageError(
            f"modality={modality} is not one of {', '.join(_MODALITIES)}.",
            "all samples of a dataset have the same modalities, so each is built by itself.",
            "use -o modality=NAME, and build each into a folder of its own.",
        )
    find_media_folders(inputs, media, (_ROOT,))
    base = f"{_ROOT}/" if (inputs / _ROOT).is_dir() else ""
    wanted = [
        f for f in FILES if f.modality == modality and (files is None or _is_chosen(f, files))
    ]
    existing = [f for f in wanted if (inputs / f"{base}{f.name}").is_file()]
    taken = [f for f in existing if include_test or not f.test]
    if not taken:
        raise UsageError(
            f"{inputs} has no {' or '.join(f.name for f in wanted) or f'file called {files}'}.",
            "nothing can be built without it.",
            "name the folder InstructionTuning of csuhan/OneLLM_InstructionTuning as IN.",
        )
    splits = chain.from_iterable(split_rows(inputs, f"{base}{f.name}", _ROWS) for f in taken)
    return DatasetDescription(
        () if modality == TEXT_ONLY else (modality,),
        splits,
        tuple(_make_notes(wanted, existing, taken)),
        dict(LISTED) if listed and modality != TEXT_ONLY else {},
    )


def _is_chosen(file: _InstructionFile, files: str) -> bool:
    return PurePosixPath(file.name).stem in {
        PurePosixPath(f.strip()).stem for f in files.split(",")
    }


def _make_notes(
    wanted: Sequence[_InstructionFile],
    existing: Sequence[_InstructionFile],
    taken: Sequence[_InstructionFile],
) -> Iterator[str]:
    if absent := [f.name for f in wanted if f not in existing]:
        yield f"missing: {', '.join(absent)}"
    if tests := [f.name for f in existing if f.test]:
        names = ", ".join(tests)
        if any(f.test for f in taken):
            yield (
                f"WARNING: {names} are MSR-VTT's TEST split, and are in this training set because "
                f"include_test=true"
            )
        else:
            yield (
                f"WARNING: {names} left out: the reference trains on MSR-VTT's TEST split; "
                f"-o include_test=true does so too"
            )


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    modality: str,
    media: Path | None,
    missing: str,
    listed: bool,
    **options: Any,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    context = AnnotationContext(
        inputs, find_media_folders(inputs, media, (_ROOT,)), description, options
    )
    read = _read_listed if listed and modality != TEXT_ONLY else _read_sample
    for item in read_rows(inputs, description):
        yield from read_raw_samples(lambda i: read(context, i, modality), item, 1, missing)


def _read_listed(
    context: AnnotationContext, item: JsonItem, modality: str
) -> Sequence[AnnotatedSample]:
    """A row with any number of media of its modality, where placeholders stand in its text."""
    row = item.value
    key = f"{PurePosixPath(context.description['file']).stem}-{item.number:07d}"
    files = row.get("image")
    meta: dict[str, Any] = {"id": str(row.get("id", ""))}
    found: list[tuple[str, dict[str, Media]]] = []
    if modality == "imu":
        found.append((modality, _find_window(context, row, meta)))
    else:
        maps = row.get(f"{modality}_image")
        names = files if isinstance(files, list) else [files]
        pairs = maps if isinstance(maps, list) else [maps] * len(names)
        for name, other in zip(names, pairs, strict=True):
            own = _find_medium(context, modality, require_text(name, "image"), meta)
            if modality in ("depth", "normal"):
                own |= _find_map(context, modality, other)
            found.append((modality, own))
    turns = clean_turns(require_conversation(row), tags=False, placeholders=True)
    turns = [{**turn, "value": _name_tags(turn["value"], modality)} for turn in turns]
    parts, listed = make_numbered_parts(found)
    check_tags(turns, listed, (modality,))
    return [AnnotatedSample(key, parts, turns, meta={**meta, "media": listed})]


def _name_tags(text: str, modality: str) -> str:
    """Placeholders by the modality: the files have `<image>` for all, and `<rgbd>` for depth."""
    for tag in ("<image>", "<rgbd>", "<rgbn>"):
        text = text.replace(tag, f"<{modality}>")
    return text


def _read_sample(
    context: AnnotationContext, item: JsonItem, modality: str
) -> Sequence[AnnotatedSample]:
    row, key = item.value, f"{PurePosixPath(context.description['file']).stem}-{item.number:07d}"
    text = modality == TEXT_ONLY
    meta: dict[str, Any] = {"id": str(row.get("id", ""))}
    turns = clean_turns(require_conversation(row), tags=not text)
    if text:
        return [AnnotatedSample(key, {}, turns, meta=meta)]
    parts = (
        _find_window(context, row, meta)
        if modality == "imu"
        else _find_medium(context, modality, require_one_file(row["image"], "image"), meta)
    )
    if modality in ("depth", "normal"):
        parts |= _find_map(context, modality, row[f"{modality}_image"])
    return [AnnotatedSample(key, parts, turns, meta=meta)]


def _find_map(context: AnnotationContext, modality: str, name: Any) -> dict[str, Media]:
    """The depth or normal map of a picture."""
    names = _list_names(require_text(name, f"{modality}_image"))
    [(extension, file)] = context.find_media("image", *names).items()
    return {f"{modality}.{extension}": file}


def _list_names(path: str) -> list[str]:
    """Names that a path of the files may have: as it is, and from after `InstructionTuning/`."""
    return list(dict.fromkeys((path, path.rpartition(f"{_ROOT}/")[2])))


def _find_medium(
    context: AnnotationContext, modality: str, path: str, meta: dict[str, Any]
) -> dict[str, Media]:
    """The part that the row's `image` names, of any modality but IMU."""
    if modality == "point":
        return _find_cloud(context, path, meta)
    if modality in ("depth", "normal"):
        return context.find_media("image", *_list_names(path))
    meta["media"] = path
    if modality == "fmri":
        [(_, file)] = context.find_media("fmri", *_list_names(path)).items()
        return {"fmri.npy": MeanOfRepetitions(file)}
    stems = [str(PurePosixPath(n).with_suffix("")) for n in _list_names(path)]
    others = [
        f"{s}.{e}"
        for s in stems
        for e in next(iter(get_modality(modality).required_parts.values()))
    ]
    return context.find_media(modality, *_list_names(path), *others)


def _find_cloud(context: AnnotationContext, path: str, meta: dict[str, Any]) -> dict[str, Media]:
    """A cloud (`.npy`, `.pt`) by its path or PointLLM's name (`8192_npy/<id>_8192.npy`)."""
    uid = PurePosixPath(path).stem.removesuffix("_8192")
    meta["object_id"] = uid
    folders = [str(PurePosixPath(n).parent) for n in _list_names(path)]
    neighbours = (f"{PurePosixPath(f).parent}/8192_npy" for f in folders)
    beside = [
        f"{f}/{n}"
        for f in (*folders, *neighbours, "point/8192_npy", "8192_npy")
        for n in (f"{uid}_8192.npy", f"{uid}.npy", f"{uid}.pt")
    ]
    if any(".." in PurePosixPath(n).parts for n in (path, *beside)):
        raise BadSampleError(f"unreadable row: the file name {path} leads out of the folder")
    file = find_first_file(context.folders, [*_list_names(path), *beside])
    if file is None:
        raise MediaNotFetchedError(f"missing file: {path}")
    return (
        {"npy": TensorCloud(file, file.name)}
        if file.suffix == ".pt"
        else context.find_media("point", *_list_names(path), *beside)
    )


def _find_window(
    context: AnnotationContext, row: Mapping[str, Any], meta: dict[str, Any]
) -> dict[str, Media]:
    """The row's window; `imu_path` is the folder of the recordings, or a recording."""
    units = parse_imu_units(context.options.get("imu_units"))
    uid = require_text(row["video_uid"], "video_uid")
    path = str(row.get("imu_path", "")).rstrip("/")
    window = float(row["window_start"]), float(row["window_end"])
    meta.update(video_uid=uid, window_start=window[0], window_end=window[1])
    folder = str(PurePosixPath(path).parent) if path.endswith((".npy", ".csv")) else path
    places = [*_list_names(folder), "imu", ""]
    if any(".." in PurePosixPath(n).parts for n in places):
        raise BadSampleError(f"unreadable row: the path {path} leads out of the folder")
    for root in context.folders:
        for name in places:
            if (found := find_recording(root / name if name else root, uid)) is not None:
                return {"imu.npy": CutImuWindow(*found, *window, _MIN_SAMPLES, units)}
    raise MediaNotFetchedError(f"missing file: no recording of video {uid} in {path or 'IN'}")


SOURCE = Source(
    "onellm-instruct",
    "OneLLM's InstructionTuning/ files, one modality at a time "
    "(-o modality=image|text|video|audio|point|depth|normal|imu|fmri)",
    plan=plan,
    raw_samples=raw_samples,
    own_keys=dict.fromkeys(UNIT_KEYS, "imu_units"),
    options={
        "modality": Option(None, f"required: which rows are built: {', '.join(_MODALITIES)}"),
        "files": Option(
            None, "only these files of the modality, separated by commas (cococap_train)"
        ),
        "media": Option(None, "the folder at which the rows' paths begin, if it is not IN", Path),
        "include_test": Option(
            False, "use MSR-VTT's test split too, as the reference's training list does", bool
        ),
        "imu_units": IMU_UNITS_OPTION,
        "missing": MISSING_OPTION,
        "listed": Option(
            False,
            "samples list their media: any number in a row, where <image> (or the modality's tag) "
            "stands in the text",
            bool,
        ),
    },
    licence="OneLLM: research only; media under the licences of their datasets",
)
