"""`onellm shards build mme-eval | mmvet-eval | msvd-qa-eval | ... IN OUT`: other questions.

| source | files | media |
|---|---|---|
| mme-eval | MME_Benchmark_release_version/TASK/*.txt beside the pictures | the same folders |
| mmvet-eval | mm-vet.json | images/ |
| msvd-qa-eval | test_qa.json, youtube_mapping.txt | YouTubeClips/NAME.avi |
| clotho-aqa-eval | clotho_aqa_test.csv | audio_files/ |
| music-avqa-eval | avqa-test.json | videos with sound |
| avsd-eval | test_set4DSTC7-AVSD.json, test_set4DSTC7-AVSD_multiref.json | Charades' videos |
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from onellm_dist.shards.sources.readers.benchmarks import (
    BenchmarkFiles,
    BenchmarkRow,
    BenchmarkSet,
)
from onellm_dist.shards.sources.readers.media_files import list_picture_names

_MME = "MME_Benchmark_release_version"
_BLANK = re.compile(r"<\w+>")


def _read_mme(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    """A text file per picture with two lines `question<TAB>Yes`; some tasks keep them apart."""
    root = files.inputs / _MME
    root = root if root.is_dir() else files.inputs
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        apart = folder / "questions_answers_YN"
        texts = sorted((apart if apart.is_dir() else folder).glob("*.txt"))
        for text in texts:
            yield from _read_mme_picture(root, folder, text)


def _read_mme_picture(root: Path, folder: Path, text: Path) -> Iterator[BenchmarkRow]:
    lines = [line for line in text.read_text("utf-8").splitlines() if line.strip()]
    if len(lines) != 2:
        raise ValueError(f"{text} has {len(lines)} questions, not 2")
    medium = f"{folder.name}/{text.stem}"
    within = folder.relative_to(root.parent).as_posix()
    stems = [f"{within}/images/{text.stem}.jpg", f"{within}/{text.stem}.jpg"]
    names = [
        name
        for stem in stems
        for whole in list_picture_names(stem)
        for name in (whole, whole.partition("/")[2])
    ]
    for number, line in enumerate(lines):
        question, tab, answer = line.rpartition("\t")
        if not tab or answer.strip() not in ("Yes", "No"):
            raise ValueError(f"{text}: line {number + 1} does not end with Yes or No")
        record = {
            "id": f"{medium}-{number}",
            "text": question,
            "answers": [answer.strip()],
            "labels": {"task": folder.name},
            "extra": {"file": text.stem},
            "medium": medium,
        }
        yield BenchmarkRow(record, medium, {"image": names})


def _read_mmvet(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    for key, row in files.load_json("mm-vet.json").items():
        record = {
            "id": str(key),
            "text": row["question"],
            "answers": [row["answer"]],
            "labels": {"capabilities": " + ".join(sorted(row.get("capability", [])))},
            "extra": {"key": str(key)},
            "medium": row["imagename"],
        }
        yield BenchmarkRow(record, row["imagename"], {"image": [row["imagename"]]})


def _read_msvd(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    mapping = {}
    for line in files.find("youtube_mapping.txt").read_text("utf-8").splitlines():
        if line.strip():
            name, number = line.split()
            mapping[number] = name
    for row in files.load_json("{split}_qa.json"):
        name = mapping[f"vid{int(row['video_id'])}"]
        record = {
            "id": str(row["id"]),
            "text": row["question"],
            "answers": [row["answer"]],
            "labels": {"question word": row["question"].split()[0].lower()},
            "medium": name,
        }
        yield BenchmarkRow(record, name, {"video": [f"{name}.avi", f"{name}.mp4"]})


def _read_clotho_aqa(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    """A row for each of three people; the rows of a question become one."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in files.read_table("clotho_aqa_{split}.csv"):
        found.setdefault((row["file_name"], row["QuestionText"].strip()), []).append(row["answer"])
    for number, ((name, question), answers) in enumerate(found.items()):
        yes_no = all(a.strip().lower() in ("yes", "no") for a in answers)
        record = {
            "id": str(number),
            "text": question,
            "answers": answers,
            "labels": {"answer": "yes or no" if yes_no else "one word"},
            "medium": name,
        }
        yield BenchmarkRow(record, name, {"audio": [name]})


def _read_music_avqa(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    """The key of the answer is `anser`; values fill the blanks of a question in order."""
    for row in files.load_json("avqa-{split}.json", "data/json/avqa-{split}.json"):
        modality, kind = ast.literal_eval(row["type"])
        text = _fill_blanks(row["question_content"], ast.literal_eval(row["templ_values"]))
        video = str(row["video_id"])
        record = {
            "id": str(row["question_id"]),
            "text": text,
            "answers": [str(row["anser"])],
            "labels": {"modality": modality, "type": f"{modality} {kind}"},
            "medium": video,
        }
        folders = ("", "MUSIC-AVQA-videos-Real/", "MUSIC-AVQA-videos-Synthetic/")
        names = [f"{folder}{video}.mp4" for folder in folders]
        sounds = [f"audio/{video}.wav", f"{video}.wav", *names]
        yield BenchmarkRow(record, video, {"video": names, "audio": sounds})


def _fill_blanks(text: str, values: Sequence[str]) -> str:
    if (blanks := len(_BLANK.findall(text))) > len(values):
        raise ValueError(f"{text!r} has {blanks} blanks and {len(values)} values")
    left = iter(values)
    return _BLANK.sub(lambda _: str(next(left)), text)


def _read_avsd(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    """The last question of each dialogue; the references, in COCO's form, have the same order."""
    dialogues = files.load_json("test_set4DSTC7-AVSD.json")["dialogs"]
    references: dict[int, list[str]] = {}
    listed = files.load_json("test_set4DSTC7-AVSD_multiref.json")["annotations"]
    for row in listed:
        references.setdefault(int(row["image_id"]), []).append(row["caption"])
    for number, dialogue in enumerate(dialogues, start=1):
        video = str(dialogue["image_id"])
        record = {
            "id": str(number),
            "text": dialogue["dialog"][-1]["question"],
            "answers": references[number],
            "extra": {"image_id": number},
            "medium": video,
        }
        names = [f"{video}.mp4"]
        yield BenchmarkRow(record, video, {"video": names, "audio": [f"{video}.wav", *names]})


SOURCES = tuple(
    benchmark.make_source()
    for benchmark in (
        BenchmarkSet(
            "mme",
            f"MME: {_MME}/",
            ("image",),
            {"test": (2_374,)},
            _read_mme,
            licence="by request",
        ),
        BenchmarkSet(
            "mmvet",
            "MM-Vet: mm-vet.json and images/",
            ("image",),
            {"test": (218,)},
            _read_mmvet,
            folders=("images",),
            licence="CC-BY-NC 4.0",
        ),
        BenchmarkSet(
            "msvd-qa",
            "MSVD-QA: test_qa.json, youtube_mapping.txt and YouTubeClips/",
            ("video",),
            {"test": (13_157,), "val": ()},
            _read_msvd,
            folders=("YouTubeClips", "videos"),
            licence="research only",
        ),
        BenchmarkSet(
            "clotho-aqa",
            "Clotho-AQA: clotho_aqa_test.csv and audio_files/",
            ("audio",),
            {"test": (), "val": ()},
            _read_clotho_aqa,
            folders=("audio_files",),
            licence="Zenodo 6473207",
        ),
        BenchmarkSet(
            "music-avqa",
            "MUSIC-AVQA: avqa-test.json and videos with sound",
            ("video", "audio"),
            {"test": (9_185, 9_129), "val": ()},
            _read_music_avqa,
            folders=("videos",),
            licence="GPL-3.0 (README), MIT (LICENSE)",
        ),
        BenchmarkSet(
            "avsd",
            "AVSD of DSTC7: test_set4DSTC7-AVSD.json, its references, and Charades' videos",
            ("video", "audio"),
            {"test": (1_710,)},
            _read_avsd,
            folders=("videos", "Charades_v1_480", "Charades_v1"),
            licence="research only",
        ),
    )
)
