"""`onellm shards build nyuv2-depth-eval | sunrgbd-normal-eval | ego4d-imu-eval IN OUT`.

| source | files | media |
|---|---|---|
| nyuv2-depth-eval, | SUNRGBD/, allsplit.mat of its toolbox: the test | image/ and depth_bfx/ |
| sunrgbd-depth-eval | rooms, with the class in scene.txt | of each room |
| nyuv2-normal-eval, | the same | image/ and normal/, which you make |
| sunrgbd-normal-eval | | (the paper's are a model's) |
| ego4d-imu-eval | imu_2000_cococap.json | ID.csv or ID.npy of Ego4D's IMU |

NYUv2's rooms are those of SUNRGBD/kv1/NYUdata; a class besides its nine is `others`. Of SUN RGB-D
the rooms of its 19 classes are asked. SUN RGB-D's depth is turned into millimetres.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onellm_dist.shards.sources.readers.benchmarks import (
    BenchmarkFiles,
    BenchmarkRow,
    BenchmarkSet,
    MediaNames,
)
from onellm_dist.shards.sources.readers.imu_windows import CutImuWindow, find_recording
from onellm_dist.shards.sources.readers.media_files import get_extension
from onellm_dist.shards.sources.readers.scene_rooms import (
    SunDepth,
    find_only_file,
    list_rooms,
    read_class,
)

OTHERS = "others"
NYU_CLASSES = (
    *("bedroom", "living room", "kitchen", "bathroom", "dining room", "office", "home office"),
    *("classroom", "bookstore", OTHERS),
)
SUN_CLASSES = (
    *("bathroom", "bedroom", "classroom", "computer room", "conference room", "corridor"),
    *("dining area", "dining room", "discussion area", "furniture store", "home office"),
    *("kitchen", "lab", "lecture theatre", "library", "living room", "office", "rest space"),
    "study space",
)
_NYU = "kv1/NYUdata/"
_MIN_SAMPLES = 10
"""Samples of a window below which the reference gives up."""


def _read_rooms(files: BenchmarkFiles, name: str, kind: str) -> Iterator[BenchmarkRow]:
    listed = files.find("allsplit.mat", "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat")
    top = files.inputs / "SUNRGBD" if (files.inputs / "SUNRGBD").is_dir() else files.inputs
    classes = NYU_CLASSES if name == "nyuv2" else SUN_CLASSES
    for room in list_rooms(listed, "alltest"):
        key = room.as_posix()
        if name == "nyuv2" and not key.startswith(_NYU):
            continue
        found = read_class(top / key)
        if name == "nyuv2" and found not in classes:
            found = OTHERS
        if found in classes:
            record = {
                "id": key,
                "options": list(classes),
                "answers": [found],
                "labels": {"class": found},
                "medium": key,
            }
            yield BenchmarkRow(record, key, _find_maps(files.inputs, top / key, kind))


def _find_maps(inputs: Path, room: Path, kind: str) -> MediaNames:
    picture, depth = find_only_file(room, "image"), find_only_file(room, "depth_bfx", "depth")
    normal = find_only_file(room, "normal")
    missing = [f"{room.name}/{kind}"]
    second: MediaNames
    if kind == "depth":
        second = {"depth.png": missing if depth is None else SunDepth(depth)}
    else:
        suffix = "png" if normal is None else normal.suffix.lower().lstrip(".")
        second = {f"normal.{suffix}": missing if normal is None else normal}
    if picture is None:
        return {"image": [f"{room.name}/image"], **second}
    extension = get_extension("image", picture.name)
    if extension is None:  # its name is refused where it is looked for
        return {"image": [picture.relative_to(inputs).as_posix()], **second}
    return {extension: picture, **second}


def _read_imu(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    content = files.load_json("imu_2000_cococap.json")
    captions: dict[str, list[str]] = {}
    for row in content["annotations"]:
        captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    for window in content["images"]:
        key, uid = str(window["id"]), str(window["video_uid"])
        start, end = float(window["window_start"]), float(window["window_end"])
        recording = find_recording(files.inputs, uid)
        media: MediaNames = (
            {"imu": [f"{uid}.csv"]}
            if recording is None
            else {"imu.npy": CutImuWindow(*recording, start, end, _MIN_SAMPLES)}
        )
        record = {"id": key, "answers": captions[key], "medium": key, "extra": {"video": uid}}
        yield BenchmarkRow(record, key, media)


def _make_rooms(name: str, title: str, count: int, kind: str) -> BenchmarkSet:
    return BenchmarkSet(
        f"{name}-{kind}",
        f"{title}: rooms with their {kind} maps, from SUNRGBD/ and allsplit.mat",
        (kind,),
        {"test": (count,)},
        lambda files: _read_rooms(files, name, kind),
        licence="research only",
        meta={"depth_is_distance": True} if kind == "depth" else {},
    )


SOURCES = tuple(
    benchmark.make_source()
    for benchmark in (
        *(_make_rooms("nyuv2", "NYUv2", 654, kind) for kind in ("depth", "normal")),
        *(_make_rooms("sunrgbd", "SUN RGB-D", 4_659, kind) for kind in ("depth", "normal")),
        BenchmarkSet(
            "ego4d-imu",
            "Ego4D's IMU: imu_2000_cococap.json, recordings",
            ("imu",),
            {"test": (2_000,)},
            _read_imu,
            licence="Ego4D's licence",
        ),
    )
)
