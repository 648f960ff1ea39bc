"""What cc3m-depth and cc3m-normal share: pictures, their captions, and maps of the pictures.

Pictures and captions come from img2dataset's tars, from a folder tree with `x.jpg` and `x.txt` (its
`files` output), or from a table with the columns `caption` and `url`, where `url` is a local path
(the reference's cc3m.csv). Maps of the picture `00012/000120001.jpg` (of a tar:
`00012.tar/000120001.jpg`) are found in three ways:

| | |
|---|---|
| parallel tree | cc3m_depth/00012/000120001.jpg (.png, ...), as the reference has them |
| Omnidata | 000120001_depth.png in the same subfolder of the maps' folder, or at its top |
| made here | by a depth model, if one is named |

Omnidata's maps show the centre square of a picture, so the picture is cut to it too. If its own
`x_rgb.png` lies beside the map, that is used instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.modalities.io.pictures import IMAGE_EXTENSIONS
from onellm_dist.shards.format.names import make_safe_key
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Media,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.centre_square import CentreSquare
from onellm_dist.shards.sources.readers.delimited import (
    CSV,
    TSV,
    Dialect,
    RowRange,
    find_row_ranges,
    read_header,
    read_rows,
)
from onellm_dist.shards.sources.readers.depth_models import EstimatedMap, check_model
from onellm_dist.shards.sources.readers.img2dataset import (
    find_tars,
    read_tar_samples,
    split_tars,
)
from onellm_dist.shards.sources.readers.map_options import (
    check_map_orientation,
    make_map_options,
)
from onellm_dist.shards.sources.readers.media_files import get_picture_extension, resolve_below

_ROWS = 2000


@dataclass(frozen=True)
class _MapFolders:
    """Where pictures and maps lie."""

    pictures: Path
    maps: Path


def make_map_source(kind: str) -> Source:
    """Make the source of one kind of map.

    Args:
        kind: `depth` or `normal`.
    """

    def plan(inputs: Path, *, seed: int, **options: Any) -> DatasetDescription:
        return _plan(kind, inputs, **options)

    def raw_samples(
        inputs: Path, description: SplitDescription, **options: Any
    ) -> Iterator[RawSample]:
        return _raw_samples(kind, inputs, description, **options)

    return Source(
        f"cc3m-{kind}",
        f"CC3M pictures with {kind} maps: parallel trees, Omnidata's output, or made here "
        f"(-o depth_model=DIR)",
        plan=plan,
        raw_samples=raw_samples,
        options=make_map_options(kind),
        places=("images", "maps"),
        own_keys={key: key for key in get_modality(kind).meta_keys},
        licence="CC3M: free for any purpose, pictures of their owners",
    )


def _find_folders(kind: str, inputs: Path, images: Path | None, maps: Path | None) -> _MapFolders:
    if images is not None:
        pictures = resolve_below(inputs, images)
    else:
        pictures = inputs / "cc3m" if (inputs / "cc3m").is_dir() else inputs
    if maps is not None:
        return _MapFolders(pictures, resolve_below(inputs, maps))
    tree = next(
        (f for f in (inputs / f"cc3m_{kind}", inputs.parent / f"cc3m_{kind}") if f.is_dir()), None
    )
    return _MapFolders(pictures, tree if tree is not None else pictures)


def _plan(
    kind: str,
    inputs: Path,
    *,
    images: Path | None,
    maps: Path | None,
    captions: Path | None,
    depth_model: Path | None,
    unfinished: str,
    map_orientation: str | None,
    **_: Any,
) -> DatasetDescription:
    check_map_orientation(map_orientation)
    folders = _find_folders(kind, inputs, images, maps)
    for folder in (folders.pictures, *([] if depth_model is not None else [folders.maps])):
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: there is no such folder.",
                "pictures or maps are searched there.",
                "see -o images= and -o maps=.",
            )
    if depth_model is not None:
        attributes = check_model(depth_model)
        notes = [
            f"{kind} maps are made by {attributes['depth_model']} "
            f"(weights {attributes['depth_model_sha256'][:12]})"
        ]
    else:
        attributes, notes = {}, [f"{kind} maps are searched in {folders.maps}"]
    if captions is not None:
        if not resolve_below(inputs, captions).is_file():
            raise UsageError(
                f"{resolve_below(inputs, captions)}: there is no such file.",
                "captions are read from it.",
                "check -o captions=.",
            )
        splits = _split_table(resolve_below(inputs, captions))
    elif next(iter(folders.pictures.glob("*.tar")), None) is not None:
        splits, more = split_tars(folders.pictures, find_tars(folders.pictures), unfinished)
        notes += more
    else:
        splits = _split_tree(folders)
    return DatasetDescription((kind,), splits, tuple(notes), attributes)


def _list_pictures(folder: Path) -> list[str]:
    """The pictures of one folder, sorted, without maps that lie among them."""
    maps = tuple(f"_{m}.png" for m in ("depth", "normal", "rgb"))
    return sorted(
        p.name
        for p in folder.iterdir()
        if get_picture_extension(p.name) and not p.name.lower().endswith(maps) and p.name[0] != "."
    )


def _walk_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield relative name and path of a folder and of all folders below it, sorted."""
    waiting = [("", folder)]
    while waiting:
        name, here = waiting.pop()
        yield name, here
        inside = sorted(p.name for p in here.iterdir() if p.name[0] != "." and p.is_dir())
        waiting += [(f"{name}{child}/", here / child) for child in reversed(inside)]


def _split_tree(folders: _MapFolders) -> Iterator[InputSplit]:
    """Input splits that name the pictures of every folder, because files may be added meanwhile.

    Folders of maps below the pictures' folder are left out.
    """
    for name, folder in _walk_folders(folders.pictures):
        if name and (folder.name in ("cc3m_depth", "cc3m_normal") or folder == folders.maps):
            continue
        names = _list_pictures(folder)
        for first in range(0, len(names), _ROWS):
            rows = names[first : first + _ROWS]
            yield InputSplit(
                f"{name or '.'}:{first}", {"folder": name, "names": rows}, count=len(rows)
            )


def _split_table(table: Path) -> Iterator[InputSplit]:
    """Input splits of a table with the columns `caption` and `url`.

    Raises:
        UsageError: the table has other columns.
    """
    dialect = _detect_dialect(table)
    names, start = read_header(table, dialect)
    if not {"caption", "url"} <= set(names):
        raise UsageError(
            f"{table} has the columns {', '.join(names)}.",
            "captions and local paths are read from the columns caption and url.",
            "rename them. If it is a table of web addresses (Google's TSV), download with "
            "img2dataset, and name its output as IN.",
        )
    for found in find_row_ranges(table, dialect, _ROWS, start):
        yield InputSplit(
            f"{table.name}:{found.line}", {"range": list(found), "names": names}, count=found.size
        )


def _detect_dialect(table: Path) -> Dialect:
    """Tell tabs from commas: the reference's .csv files are tab-separated."""
    with table.open("rb") as file:
        return TSV if b"\t" in file.readline() else CSV


def _raw_samples(
    kind: str,
    inputs: Path,
    description: SplitDescription,
    *,
    images: Path | None,
    maps: Path | None,
    captions: Path | None,
    unfinished: str,
    **model: Any,
) -> Iterator[RawSample]:
    folders = _find_folders(kind, inputs, images, maps)
    if "tar" in description:
        for sample in read_tar_samples(
            folders.pictures,
            description,
            IMAGE_EXTENSIONS,
            lambda row, text: [text() or row.get("caption")],
        ):
            yield _add_map(kind, folders, model, description["tar"], sample)
        return
    if captions is not None:
        table = resolve_below(inputs, captions)
        for row in read_rows(
            table, _detect_dialect(table), RowRange(*description["range"]), description["names"]
        ):
            where = f"{table.name}:{row.line}"
            if row.problem is not None:
                yield RawSample(f"row-{row.line:09d}", where, problem=row.problem)
                continue
            name = _strip_pictures_folder(row.values["url"], folders.pictures)
            yield _make_raw_sample(kind, folders, model, name, where, row.values["caption"], None)
        return
    folder = (
        folders.pictures / description["folder"].rstrip("/")
        if description["folder"]
        else folders.pictures
    )
    for file in description["names"]:
        name = description["folder"] + file
        yield _make_raw_sample(
            kind, folders, model, name, name, None, folder / f"{file.rpartition('.')[0]}.txt"
        )


def _add_map(
    kind: str, folders: _MapFolders, model: Mapping[str, Any], tar: str, sample: RawSample
) -> RawSample:
    """Add the map to a tar's sample."""
    if sample.problem is not None or sample.skip is not None:
        return sample
    [(extension, picture)] = sample.parts.items()
    name = f"{tar.removesuffix('.tar')}/{sample.key.rpartition('/')[2]}.{extension}"
    found = _find_map(kind, folders, name, picture, **model)
    if found is None:
        return replace(
            sample, parts={}, problem=f"missing map: no {kind} map of {name} in {folders.maps}"
        )
    return replace(sample, parts=found, meta={**sample.meta, **_make_meta(kind, model)})


def _make_meta(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the `.json` of each sample says of its map; a map that is made here needs no word."""
    meta: dict[str, Any] = {}
    if options["depth_model"] is None and options["map_orientation"] is not None:
        meta["map_orientation"] = options["map_orientation"]
    if options["depth_model"] is None and options["depth_is_distance"] and kind == "depth":
        meta["depth_is_distance"] = True
    return meta


def _strip_pictures_folder(url: str, pictures: Path) -> str:
    """A path of a table relative to the pictures' folder.

    It may be `/mnt/data/cc3m/00000/1.jpg`, `datasets/cc3m/00000/1.jpg` or `00000/1.jpg`.
    """
    path = url.strip()
    root = f"{pictures}/"
    if path.startswith(root):
        return path.removeprefix(root)
    return path.rpartition("/cc3m/")[2].removeprefix("cc3m/").lstrip("/")


def _make_raw_sample(
    kind: str,
    folders: _MapFolders,
    model: Mapping[str, Any],
    name: str,
    where: str,
    caption: str | None,
    side: Path | None,
) -> RawSample:
    stem, extension = name.rpartition(".")[0], get_picture_extension(name)
    key = make_safe_key(stem or name)
    if extension is None:
        return RawSample(key, where, problem=f"unknown kind of file: {name} is not a picture")
    picture: Media = folders.pictures / name
    found = _find_map(kind, folders, name, picture, **model)
    if found is None:
        return RawSample(
            key, where, problem=f"missing map: no {kind} map of {name} in {folders.maps}"
        )
    parts: dict[str, Media] = dict(found)
    if side is not None:
        parts["txt"] = side
    return RawSample(key, where, parts, caption, _make_meta(kind, model))


def _find_map(
    kind: str,
    folders: _MapFolders,
    name: str,
    picture: Media,
    *,
    depth_model: Path | None,
    depth_is_distance: bool,
    device: str,
    map_orientation: str | None,
    strength: float = 0.0,
) -> dict[str, Media] | None:
    """The parts of the picture and its map (`KIND.EXTENSION`); None if there is no map."""
    stem, extension = name.rpartition(".")[0], get_picture_extension(name) or ""
    if depth_model is not None:
        return {
            extension: picture,
            f"{kind}.png": EstimatedMap(
                picture, depth_model, kind, depth_is_distance, strength, device
            ),
        }
    if folders.maps != folders.pictures:
        for map_extension in dict.fromkeys((extension, *IMAGE_EXTENSIONS, "npy")):
            if (tree := folders.maps / f"{stem}.{map_extension}").is_file():
                return {extension: picture, f"{kind}.{map_extension}": tree}
    for base in dict.fromkeys((stem, stem.rpartition("/")[2])):
        if (square := folders.maps / f"{base}_{kind}.png").is_file():
            shown = folders.maps / f"{base}_rgb.png"
            own: dict[str, Media] = (
                {"png": shown}
                if shown.is_file()
                else {"jpg": CentreSquare(picture, map_orientation)}
            )
            return {**own, f"{kind}.png": square}
    return None
