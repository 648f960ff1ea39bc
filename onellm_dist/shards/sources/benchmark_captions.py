"""`onellm shards build nocaps-eval | flickr30k-eval | vatex-eval | ... IN OUT`: captions.

| source | files | media |
|---|---|---|
| nocaps-eval | nocaps_val_4500_captions.json | val/ |
| flickr30k-eval | dataset_flickr30k.json (Karpathy's splits) | flickr30k-images/ |
| vatex-eval | vatex_public_test_english_v1.1.json | videos/ID.mp4 |
| clotho-eval | clotho_captions_evaluation.csv | evaluation/ |
| valor32k-eval | test_id.json, txt_mapper.json | videos/ID.mp4 |
| objaverse-caption-eval, | PointLLM_brief_description_val_200_GT.json (or 3000) | 8192_npy/ |
| objaverse-class-eval | | |
| ego4d-imu-eval | imu_2000_cococap.json | recordings, windows cut here |
| nsd-eval | fmri_eval_cococap.json | .npy by `file_name` |

All reference captions are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onellm_dist.shards.sources.readers.benchmarks import (
    BenchmarkFiles,
    BenchmarkRow,
    BenchmarkSet,
    MediaNames,
)

_VIDEOS = ("videos", "clips", "videos/all")


def make_caption_row(
    key: str, captions: Sequence[str], media: MediaNames, **others: Any
) -> BenchmarkRow:
    """A row that asks for a caption.

    Args:
        key: its id, which also names the medium.
        captions: all references; () where they are hidden.
        media: where the medium lies.
        others: `labels` and `extra`.

    Raises:
        ValueError: a reference is empty.
    """
    references = [str(caption) for caption in captions]
    if not all(text.strip() for text in references):
        raise ValueError(f"{key} has an empty caption")
    record = {"id": key, "answers": references, "medium": key, **others}
    return BenchmarkRow(record, key, media)


def _collect_captions(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """COCO's form: id of a medium -> its captions."""
    found: dict[str, list[str]] = {}
    for row in content.get("annotations", []):
        found.setdefault(str(row["image_id"]), []).append(str(row["caption"]))
    return found


def _read_nocaps(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    names = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
    content = files.load_json(names[files.split])
    captions = _collect_captions(content)
    for image in content["images"]:
        number = int(image["id"])
        labels = {"domain": str(image["domain"])} if image.get("domain") else {}
        references = captions[str(number)] if captions else []
        name = str(image["file_name"])
        yield make_caption_row(
            str(number),
            references,
            {"image": [f"{files.split}/{name}", name]},
            labels=labels,
            extra={"image_id": number},
        )


def _read_flickr30k(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    content = files.load_json("dataset_flickr30k.json", "karpathy/dataset_flickr30k.json")
    for image in content["images"]:
        if image["split"] == files.split:
            name = str(image["filename"])
            references = [s["raw"] for s in image["sentences"]]
            yield make_caption_row(name, references, {"image": [name]})


def _read_vatex(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    """A file under YouTube's id of 11 characters is taken only if it has a single clip here."""
    rows = files.load_json("vatex_public_test_english_v1.1.json")
    clips = Counter(str(row["videoID"])[:11] for row in rows)
    for row in rows:
        video = str(row["videoID"])
        names = [f"{video}.mp4"]
        if clips[video[:11]] == 1:
            names.append(f"{video[:11]}.mp4")
        yield make_caption_row(video, row["enCap"], {"video": names})


def _read_clotho(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    for row in files.read_table("clotho_captions_{split}.csv"):
        name = row["file_name"]
        references = [row[f"caption_{i}"] for i in range(1, 6)]
        yield make_caption_row(name, references, {"audio": [f"{files.split}/{name}", name]})


def _read_valor(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    captions = files.load_json("txt_mapper.json")
    for video in map(str, files.load_json("{split}_id.json")):
        names = [f"{video}.mp4", f"{video}.mkv", f"{video}.webm"]
        sounds = [f"{video}.wav", f"audio/{video}.wav", *names]
        references = captions[video]
        references = references if isinstance(references, list) else [references]
        yield make_caption_row(video, references, {"video": names, "audio": sounds})


def _read_objaverse(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    number = files.split.removeprefix("val")
    rows = files.load_json(f"PointLLM_brief_description_val_{number}_GT.json")
    for row in rows:
        key = str(row["object_id"])
        captions = [t["value"] for t in row["conversations"] if t["from"] == "gpt"]
        names = [f"{key}_8192.npy", f"{key}.npy"]
        yield make_caption_row(key, captions, {"point": names}, extra={"object_id": key})


def _read_nsd(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    content = files.load_json("fmri_eval_cococap.json")
    captions = _collect_captions(content)
    for image in content["images"]:
        key = str(image["id"])
        yield make_caption_row(key, captions[key], {"fmri": [str(image["file_name"])]})


def _make_set(
    name: str,
    summary: str,
    modalities: tuple[str, ...],
    splits: Mapping[str, tuple[int, ...]],
    read: Any,
    folders: Sequence[str],
    licence: str = "unknown",
) -> BenchmarkSet:
    return BenchmarkSet(name, summary, modalities, splits, read, folders, licence)


_OBJAVERSE = {"val200": (200,), "val3000": (3_000,)}

SOURCES = tuple(
    benchmark.make_source()
    for benchmark in (
        _make_set(
            "nocaps",
            "NoCaps: nocaps_val_4500_captions.json and pictures",
            ("image",),
            {"val": (4_500,), "test": (10_600,)},
            _read_nocaps,
            ("images",),
            "CC-BY 2.0",
        ),
        _make_set(
            "flickr30k",
            "Flickr30K in Karpathy's splits: dataset_flickr30k.json",
            ("image",),
            {"test": (1_000,), "val": ()},
            _read_flickr30k,
            ("flickr30k-images", "images"),
        ),
        _make_set(
            "vatex",
            "VATEX: vatex_public_test_english_v1.1.json and videos",
            ("video",),
            {"test": (6_000,)},
            _read_vatex,
            _VIDEOS,
            "CC-BY 4.0 (captions)",
        ),
        _make_set(
            "clotho",
            "Clotho 2.1: clotho_captions_evaluation.csv and evaluation/",
            ("audio",),
            {"evaluation": (1_045,), "validation": (1_045,)},
            _read_clotho,
            ("evaluation",),
            "Freesound, by clip",
        ),
        _make_set(
            "valor32k",
            "VALOR-32K: test_id.json, txt_mapper.json and clips with sound",
            ("video", "audio"),
            {"test": (), "val": ()},
            _read_valor,
            _VIDEOS,
        ),
        *(
            _make_set(
                f"objaverse-{what}",
                "Objaverse, PointLLM's split: PointLLM_brief_description_val_200_GT.json",
                ("point",),
                _OBJAVERSE,
                _read_objaverse,
                ("8192_npy",),
                "CC-BY-NC-SA 4.0",
            )
            for what in ("caption", "class")
        ),
        _make_set(
            "nsd",
            "NSD: fmri_eval_cococap.json and the responses that it names",
            ("fmri",),
            {"test": ()},
            _read_nsd,
            ("fmri", "nsd"),
            "NSD's data agreement",
        ),
    )
)
