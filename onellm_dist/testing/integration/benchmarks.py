"""Small benchmarks of the real media, one or more of each modality, in their official layouts.

Questions and references are the captions of the media, or plain facts about them. As in a dataset
recipe, benchmarks and modalities are named here.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from onellm_dist.testing.integration.geometry import RgbdView, draw_normals, encode_png

SHOWN = {
    "astronaut": ("an astronaut", "a motorcycle"),
    "coffee": ("a cup", "a bridge"),
    "chelsea": ("a cat", "a car"),
    "rocket": ("a rocket", "a horse"),
    "china": ("a pagoda", "a boat full of people"),
    "flower": ("a flower", "a street sign"),
}
"""Picture -> what it shows, and what it does not."""
FILMED = {
    "bikes": ("where is it?", "street"),
    "carphone_pristine": ("who is talking?", "man"),
    "bigbuckbunny": ("what animal is it?", "rabbit"),
}
"""Film -> a question and its answer."""
HEARD = {
    "bunny_first": ("Is it a cartoon?", ("yes", "yes", "no")),
    "bunny_second": ("Is it a concert?", ("no", "no", "no")),
    "austen_0880": ("Is a person speaking?", ("yes", "yes", "yes")),
    "misc_crow": ("Which animal is heard?", ("crow", "bird", "crow")),
    "drum_roll": ("Which instrument is played?", ("drum", "snare drum", "drum")),
    "guit_em9": ("Which instrument is played?", ("guitar", "guitar", "guitar")),
    "loop_tabla": ("Is it music?", ("yes", "yes", "yes")),
}
"""Sound -> a question, and the answers of three people."""
SEEN = ("astronaut", "coffee", "chelsea")
"""Pictures of which the training data of `write_seen` has copies."""
WINDOW_S = 1.9
"""Seconds of movement that are asked about: the recordings are about two seconds long."""
_FARTHEST_MM = 65_535 >> 3
"""The largest depth that SUN RGB-D's turned bits can hold with their last three free."""


def write_benchmarks(
    media: Path, views: Mapping[str, RgbdView], out: Path
) -> Mapping[str, Sequence[str]]:
    """Write a folder for each benchmark: `OUT/mme`, ...

    Args:
        media: what `collect_media` wrote.
        views: measured views by name.
        out: the folder.

    Returns:
        The folder's name -> the benchmarks that are built from it.
    """
    writers: Mapping[str, tuple[Callable[[], None], Sequence[str]]] = {
        "flickr30k": (lambda: _write_flickr30k(media, out / "flickr30k"), ["flickr30k"]),
        "mme": (lambda: _write_mme(media, out / "mme"), ["mme"]),
        "msvd-qa": (lambda: _write_msvd(media, out / "msvd-qa"), ["msvd-qa"]),
        "clotho-aqa": (lambda: _write_clotho(media, out / "clotho-aqa"), ["clotho-aqa"]),
        "objaverse": (lambda: _write_objaverse(media, out / "objaverse"), ["objaverse-caption"]),
        "nyuv2": (lambda: _write_rooms(views, out / "nyuv2"), ["nyuv2-depth", "nyuv2-normal"]),
        "ego4d": (lambda: _write_ego4d(media, out / "ego4d"), ["ego4d-imu"]),
        "nsd": (lambda: _write_nsd(media, out / "nsd"), ["nsd"]),
    }
    for write, _ in writers.values():
        write()
    return {name: benchmarks for name, (_, benchmarks) in writers.items()}


def write_seen(media: Path, out: Path) -> list[str]:
    """Write training data that has copies of some benchmarks' pictures: smaller, encoded again.

    Returns:
        The pictures' keys.
    """
    found = _find_media(media / "image", *SEEN)
    out.mkdir(parents=True)
    for key, path in found.items():
        with Image.open(path) as picture:
            small = picture.convert("RGB")
        small.thumbnail((small.width * 3 // 4, small.height * 3 // 4))
        small.save(out / f"{key}.jpg", quality=70)
        _copy(path.with_name(f"{key}.txt"), out / f"{key}.txt")
    return list(found)


def _find_media(folder: Path, *keys: str) -> dict[str, Path]:
    """Key -> the first media file of it, of those that are there; all keys without any."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        key, _, extension = path.name.partition(".")
        if extension not in ("txt", "json") and (not keys or key in keys):
            found.setdefault(key, path)
    return found


def _read_caption(media: Path) -> str:
    key = media.name.partition(".")[0]
    return media.with_name(f"{key}.txt").read_text(encoding="utf-8").strip()


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_coco(path: Path, rows: Iterable[tuple[Mapping[str, Any], str]]) -> None:
    """Images with a caption each, in COCO's form."""
    images, annotations = [], []
    for number, (image, caption) in enumerate(rows, 1):
        images.append({"id": number, **image})
        annotations.append({"id": number, "image_id": number, "caption": caption})
    _write_json(path, {"images": images, "annotations": annotations})


def _write_flickr30k(media: Path, out: Path) -> None:
    images = []
    for path in _find_media(media / "image").values():
        _copy(path, out / "images" / path.name)
        sentences = [{"raw": _read_caption(path)}]
        images.append({"filename": path.name, "split": "test", "sentences": sentences})
    _write_json(out / "dataset_flickr30k.json", {"images": images})


def _write_mme(media: Path, out: Path) -> None:
    folder = out / "MME_Benchmark_release_version" / "existence"
    for key, path in _find_media(media / "image", *SHOWN).items():
        _copy(path, folder / path.name)
        asked = "Is there {} in this image? Please answer yes or no."
        lines = [f"{asked.format(SHOWN[key][0])}\tYes", f"{asked.format(SHOWN[key][1])}\tNo"]
        (folder / f"{key}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_msvd(media: Path, out: Path) -> None:
    rows, names = [], []
    for number, (key, path) in enumerate(_find_media(media / "video", *FILMED).items(), 1):
        _copy(path, out / "YouTubeClips" / path.name)
        names.append(f"{key} vid{number}\n")
        question, answer = FILMED[key]
        rows.append({"id": number, "video_id": number, "question": question, "answer": answer})
    _write_json(out / "test_qa.json", rows)
    (out / "youtube_mapping.txt").write_text("".join(names), encoding="utf-8")


def _write_clotho(media: Path, out: Path) -> None:
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file_name", "QuestionText", "answer", "confidence"])
    for key, path in _find_media(media / "audio", *HEARD).items():
        _copy(path, out / "audio_files" / path.name)
        question, people = HEARD[key]
        rows.writerows([path.name, question, answer, "yes"] for answer in people)
    (out / "clotho_aqa_test.csv").write_text(table.getvalue(), encoding="utf-8")


def _write_objaverse(media: Path, out: Path) -> None:
    rows = []
    for key, path in _find_media(media / "point").items():
        if path.suffix == ".npy":  # the others have another number of points
            _copy(path, out / "8192_npy" / f"{key}_8192.npy")
            said = [{"from": "human", "value": "<point>\nWhat is this?"}]
            said.append({"from": "gpt", "value": _read_caption(path)})
            rows.append({"object_id": key, "conversations": said})
    _write_json(out / "PointLLM_brief_description_val_200_GT.json", rows)


def _write_rooms(views: Mapping[str, RgbdView], out: Path) -> None:
    """Places that are not rooms of NYUv2's nine classes: the right answer is `others`."""
    rooms = []
    for number, view in enumerate(views.values()):
        room = f"kv1/NYUdata/NYU{number + 1:04}"
        rooms.append(f"/n/fs/sun3d/data/SUNRGBD/{room}/")
        millimetres = np.nan_to_num(view.points[..., 2] * 1000)
        depth = np.where(millimetres <= _FARTHEST_MM, millimetres, 0).astype(np.uint16)
        pictures = {
            "image/view.png": Image.fromarray(view.rgb),
            "depth_bfx/view.png": Image.fromarray(depth << 3),  # its bits turned by three
            "normal/view.png": draw_normals(view),
        }
        for name, picture in pictures.items():
            file = out / "SUNRGBD" / room / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(picture))
        (out / "SUNRGBD" / room / "scene.txt").write_text("garage", encoding="utf-8")
    cells = np.empty((1, len(rooms)), dtype=object)
    cells[0, :] = rooms
    content = io.BytesIO()
    savemat(content, {"alltest": cells, "alltrain": cells})
    (out / "allsplit.mat").write_bytes(content.getvalue())


def _write_ego4d(media: Path, out: Path) -> None:
    rows = []
    for key, path in _find_media(media / "imu").items():
        _copy(path, out / f"{key}.csv")
        window = {"video_uid": key, "window_start": 0.0, "window_end": WINDOW_S}
        rows.append((window, _read_caption(path)))
    _write_coco(out / "imu_2000_cococap.json", rows)


def _write_nsd(media: Path, out: Path) -> None:
    rows = []
    for key, path in _find_media(media / "fmri").items():
        _copy(path, out / f"{key}.npy")
        rows.append(({"file_name": f"{key}.npy"}, _read_caption(path)))
    _write_coco(out / "fmri_eval_cococap.json", rows)
