"""NoCaps: CIDEr over the whole split; by domain with the whole split's document frequencies."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.answer_files import make_list_check, make_list_file
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_caption

MEASURES = ("CIDEr", "BLEU-4", "ROUGE-L")

TASK = Task(
    name="nocaps",
    title="NoCaps",
    summary="Captions of new objects, CIDEr.",
    modalities=("image",),
    split="val",
    prompts=make_caption("image"),
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"CIDEr": 115.9},
    note="By domain, CIDEr has the document frequencies of the whole split; the official program "
    "scores each domain by itself.",
    missing=lambda: list_missing(MEASURES),
    answer_files=make_list_file("nocaps.json", image_id="image_id", caption="answer"),
    check_file=make_list_check(image_id=int, caption=str),
)
