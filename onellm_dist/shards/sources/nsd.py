"""`onellm shards build nsd IN OUT`: fMRI of NSD's subject 1 with captions of the pictures seen.

This is the paper's fMRI data (Tab. 9). IN is MindEye's tree:
`webdataset_avg_split/{train,val,test}/{train,val,test}_subj01_*.tar` (or that folder itself), each
sample with `.nsdgeneral.npy` [repetitions, voxels] and `.coco73k.npy`, and
`COCO_73k_annots_curated.npy` [73000, 5] of text. Stored is the mean over the repetitions, fp32
[15724] (of whole numbers the array itself), with all five captions (training takes one in each
epoch) or with the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.modalities import Part
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    FileRange,
    InputSplit,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.conversations import make_caption_turns
from onellm_dist.shards.sources.readers.fmri import MeanOfRepetitions
from onellm_dist.shards.sources.readers.img2dataset import list_tar_members
from onellm_dist.shards.sources.readers.media_files import require_file, resolve_below

_CAPTIONS = (
    "COCO_73k_annots_curated.npy",
    "webdataset_avg_split/COCO_73k_annots_curated.npy",
    "../COCO_73k_annots_curated.npy",
)
_SPLITS = ("train", "val", "test")


def plan(
    inputs: Path, *, seed: int, subject: int, captions: Path | None, texts: str
) -> DatasetDescription:
    """Make an input split of each tar.

    Raises:
        UsageError: there are no tars of the subject, or no captions.
    """
    if texts not in ("all", "first"):
        raise UsageError(
            f"texts={texts} is neither all nor first.",
            "it says which captions a sample has.",
            "choose one.",
        )
    table = require_file(
        inputs, captions, _CAPTIONS, "the captions of NSD's 73,000 pictures", "captions"
    )
    _CaptionTable(resolve_below(inputs, table))
    root = inputs / "webdataset_avg_split" if (inputs / "webdataset_avg_split").is_dir() else inputs
    tars = [
        (s, t)
        for s in _SPLITS
        for t in sorted((root / s).glob(f"{s}_subj{subject:02d}_*.tar"), key=_get_tar_number)
    ]
    if not tars:
        raise UsageError(
            f"{inputs} has no train/train_subj{subject:02d}_*.tar.",
            "fMRI is read from MindEye's tars.",
            "name the folder that holds webdataset_avg_split/, and check -o subject=.",
        )
    name = "webdataset_avg_split/" if root != inputs else ""
    splits = (
        InputSplit(t.name, {"tar": f"{name}{s}/{t.name}", "captions": table}, s) for s, t in tars
    )
    return DatasetDescription(
        ("fmri",),
        splits,
        (f"{format_count(len(tars), 'tar')} of subject {subject}",),
        {"subject": subject},
    )


def _get_tar_number(tar: Path) -> tuple[int, str]:
    """Sort key that puts `train_subj01_2.tar` before `train_subj01_10.tar`."""
    tail = tar.stem.rpartition("_")[2]
    return (int(tail) if tail.isdecimal() else -1), tar.name


class _CaptionTable:
    """A `.npy` [pictures, 5] of text, read row by row.

    The complete table takes 365 MB. Memory-mapped, it would crash the process if the file changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                self.shape, fortran, self.dtype = read(file)
                self.start = file.tell()
        except OSError:
            raise
        except Exception as error:  # NumPy parses the header as Python: it may raise anything
            raise self._make_error(f"it is not a .npy ({error})") from error
        if len(self.shape) != 2 or self.dtype.kind not in "US" or fortran:
            raise self._make_error(f"it is an array of {self.dtype}, shape {self.shape}")
        promised, there = math.prod(self.shape) * self.dtype.itemsize, path.stat().st_size
        if min(self.shape) < 1 or self.start + promised != there:
            raise self._make_error(
                f"its header says {self.shape} {self.dtype}, which is not the "
                f"{there - self.start:,} bytes that follow"
            )

    def _make_error(self, why: str) -> UsageError:
        return UsageError(
            f"{self.path}: {why}.",
            "captions are looked up in it.",
            "it must be text [pictures, 5], without pickled objects.",
        )

    def read_row(self, number: int) -> list[str]:
        """Read the captions of a picture.

        Raises:
            OneLLMError: the file is cut short.
        """
        size = self.dtype.itemsize * self.shape[1]
        with self.path.open("rb") as file:
            file.seek(self.start + number * size)
            data = file.read(size)
        if len(data) != size:
            raise OneLLMError(
                f"{self.path} ends before row {number}.",
                "captions are looked up in it.",
                "download it again.",
            )
        return [
            (t.decode() if isinstance(t, bytes) else str(t)).strip()
            for t in np.frombuffer(data, self.dtype)
        ]


def raw_samples(
    inputs: Path, description: SplitDescription, *, subject: int, captions: Path | None, texts: str
) -> Iterator[RawSample]:
    """Read the samples of a tar, in its order; if it is cut short, a bad sample follows."""
    table = _CaptionTable(resolve_below(inputs, description["captions"]))
    members, fault, _ = list_tar_members(inputs / description["tar"])
    for key, parts in members.items():
        where, name = (
            f"{description['tar']}: {key}",
            f"{Path(description['tar']).stem}-{Path(key).name}",
        )
        found = _look_up_captions(table, parts)
        if isinstance(found, str):
            yield RawSample(name, where, problem=found)
            continue
        picture, captions_of_picture = found
        # Empty ones were curated away; MindEye takes one that is not empty.
        texts_given = [t for t in captions_of_picture if t]
        if not texts_given:
            yield RawSample(
                name,
                where,
                problem=f"empty caption: picture {picture} has none in {table.path.name}",
            )
            continue
        meta: dict[str, Any] = {
            "coco73k": picture,
            "conversations": make_caption_turns("fmri", texts_given[0]),
        }
        if texts == "all":
            meta["caption"] = texts_given  # training takes another one in each epoch
        media = {"fmri.npy": MeanOfRepetitions(parts["nsdgeneral.npy"])}
        yield RawSample(name, where, media, texts_given[0] if texts == "first" else None, meta)
    if fault is not None:
        # Nothing says how many samples are lost.
        yield RawSample(f"{Path(description['tar']).stem}-end", description["tar"], problem=fault)


def _look_up_captions(
    table: _CaptionTable, parts: Mapping[str, FileRange]
) -> tuple[int, list[str]] | str:
    """(the picture's number, its captions), or what is wrong."""
    missing = [e for e in ("nsdgeneral.npy", "coco73k.npy") if e not in parts]
    if missing:
        return f"missing part: no .{missing[0]} in the tar"
    try:
        number = read_npy(Part("coco73k.npy", parts["coco73k.npy"].read_bytes())).reshape(-1)
    except SampleError as error:
        return f"unreadable coco73k.npy: {error.what}"
    if number.size != 1 or not 0 <= int(number[0]) < table.shape[0]:
        return (
            f"no such picture: coco73k is {number.tolist()[:3]}, and there are captions of "
            f"{table.shape[0]}"
        )
    return int(number[0]), table.read_row(int(number[0]))


SOURCE = Source(
    "nsd",
    "NSD's fMRI from MindEye's tars, with COCO captions",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "captions": Option(None, "COCO_73k_annots_curated.npy, if it is not in IN", Path),
        "subject": Option(
            1, "NSD's subject; the model's tokenizer is made for subject 1 (15,724 voxels)", int
        ),
        "texts": Option(
            "all",
            "captions of a sample: all five (training takes one in each epoch, "
            "as the reference does), or the first",
        ),
    },
    licence="NSD Data Access Agreement",
)
