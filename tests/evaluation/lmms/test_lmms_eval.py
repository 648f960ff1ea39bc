"""lmms-eval and lm-evaluation-harness, each as installed from PyPI in an environment of their own.

The environment sees the packages of this one (torch) through a .pth file, and what is installed in
it comes first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.evaluation.answer_folder import (
    AnswerWriter,
    WrittenAnswer,
    read_answers,
    read_questions,
    write_task,
)
from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_folder
from onellm_dist.evaluation.questions import BenchmarkQuestion, GivenAnswer
from onellm_dist.evaluation.score import score_folder, write_scores
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.model.presets import load_model

pytest_plugins = ("benchmark_fixtures",)
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[3]
REUSED = "ONELLM_LMMS_ENVIRONMENT"
"""Variable with an environment that an earlier run of these tests made."""
PACKAGES = ("lmms-eval==0.7.3", "lm-eval==0.4.13")


class Environment:
    """A Python in which lmms-eval and lm-eval are installed."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        if not self.bin.exists():
            self._make(folder)
        own = ("--no-deps", "--no-build-isolation", str(ROOT))
        self.run("-m", "pip", "install", "--quiet", "--force-reinstall", *own)

    def _make(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.run("-m", "pip", "install", "--quiet", "setuptools", "wheel")
        inside = self.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        (Path(inside) / "zz_outside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        self.run("-m", "pip", "install", "--quiet", *PACKAGES)

    def run(self, *arguments: str, **env: str) -> str:
        """Run its Python; returns what it prints."""
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [str(self.bin / "python"), *arguments],
            env={**clean, **offline, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = os.environ.get(REUSED)
    return Environment(Path(made) if made else tmp_path_factory.mktemp("lmms") / "env")


WRITE_DATA = """
import json, sys
from datasets import Dataset, Features, Image, Value
rows = json.load(open(sys.argv[1]))
features = Features({"question_id": Value("string"), "category": Value("string"),
                     "question": Value("string"), "answer": Value("string"), "image": Image()})
Dataset.from_list(rows, features=features).to_parquet(sys.argv[2])
"""
TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
task: mme_local
test_split: test
output_type: generate_until
doc_to_visual: !function local_utils.mme_doc_to_visual
doc_to_text: !function local_utils.mme_doc_to_text
doc_to_target: answer
process_results: !function local_utils.mme_process_results
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
metric_list:
  - metric: mme_perception_score
    aggregation: !function local_utils.mme_aggregate_results
    higher_is_better: true
  - metric: mme_cognition_score
    aggregation: !function local_utils.mme_aggregate_results
    higher_is_better: true
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
"""


def test_both_give_the_same_answers_and_the_same_score(
    environment: Environment,
    benchmark_data: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model, processor = load_model(path=None, preset="toy", seed=0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data, ours = benchmark_data("mme"), tmp_path / "ours"
    options = EvaluationOptions(format="raw", any_count=True)
    evaluate_folder(tmp_path / "model", ["mme"], data, ours, options, None)
    questions, answers = read_questions(ours / "mme"), read_answers(ours / "mme")
    pictures = data.parent / "in" / "mme"
    rows = [
        {
            "question_id": question.medium,
            "category": question.labels["task"],
            "question": question.text,
            "answer": question.answers[0],
            "image": {"path": str(find_picture(pictures, question))},
        }
        for question in questions
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = tmp_path / "task"
    task.mkdir()
    (task / "local_utils.py").write_text("from lmms_eval.tasks.mme.utils import *\n")
    tokens = get_task("mme").max_new_tokens
    (task / "mme_local.yaml").write_text(TASK.format(data=tmp_path / "mme.parquet", tokens=tokens))
    environment.run("-c", WRITE_DATA, str(tmp_path / "rows.json"), str(tmp_path / "mme.parquet"))
    named = ["--model", "onellm", "--model_args", f"pretrained={tmp_path / 'model'},format=raw"]
    asked = ["--tasks", "mme_local", "--include_path", str(task), "--batch_size", "4"]
    written = ["--output_path", str(tmp_path / "theirs"), "--log_samples"]
    hub = str(tmp_path / "hub")
    environment.run("-m", "lmms_eval", *named, *asked, *written, HF_HOME=hub)
    (samples,) = (tmp_path / "theirs").rglob("*_samples_mme_local.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    said = {line["doc_id"]: line["filtered_resps"] for line in lines}
    said = {i: text if isinstance(text, str) else text[0] for i, text in said.items()}
    assert [said[i] for i in range(len(questions))] == [answers[q.id].answer for q in questions]
    assert len(set(said.values())) > 2, "equal answers show nothing"
    (results,) = (tmp_path / "theirs").rglob("*_results.json")
    theirs = json.loads(results.read_text())["results"]["mme_local"]
    (score,) = score_folder(ours)
    for measure in score.measures:
        wanted = theirs.get(f"mme_{measure.name}_score,none")
        assert wanted is None or measure.value == pytest.approx(wanted), measure.name


def find_picture(root: Path, question: BenchmarkQuestion) -> Path:
    """The file that a question is about."""
    stem = Path(question.medium).stem
    (found,) = (p for p in root.rglob(f"{stem}.jpg") if question.labels["task"] in p.parts)
    return found


SAID = ["Yes", "no.", "yes, it is", "Nothing", "n", "2", "two", "a red car", "the red  car", "B"]
SAID += [
    "B. red",
    "b",
    "The answer is B.",
    "B.",
    "don't",
    "red,car",
    "1,000",
    "",
    "Y",
    "unanswerable",
]
SCORE = """
import copy, json, sys
from lmms_eval.tasks.mme.utils import mme_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
rules = {"mme": mme_process_results, "vqav2": vqav2_process_results,
         "textvqa": textvqa_process_results, "vizwiz": vizwiz_vqa_process_results,
         "scienceqa": sqa_process_results}
found = []
for row in json.load(open(sys.argv[1])):
    value = rules[row["task"]](copy.deepcopy(row["doc"]), [row["answer"]])
    value = value.get("exact_match", value.get("mme_perception_score"))
    found.append(value["score"] if isinstance(value, dict) else value)
print(json.dumps(found))
"""
OTHERWISE = {
    *(("scienceqa", text) for text in ("b", "B.", "The answer is B.")),
    ("mme", "Y"),
}
"""lmms-eval reads a small letter and `B.`, and no sentence; LLaVA's program does the opposite. A
letter alone is Otter's rule; MME's program does not read it."""


def test_both_score_the_same_answers_alike(environment: Environment, tmp_path: Path) -> None:
    ten = ["red car"] * 4 + ["2"] * 2 + ["yes", "unanswerable", "don't", "1,000"]
    documents: dict[str, tuple[dict[str, Any], BenchmarkQuestion]] = {
        "mme": (
            {"answer": "Yes", "category": "existence", "question_id": "a"},
            BenchmarkQuestion("a", answers=["Yes"], labels={"task": "existence"}, medium="a"),
        ),
        "scienceqa": (
            {"answer": 1, "choices": ["blue", "red"]},
            BenchmarkQuestion("a", answers=["B"], options=["blue", "red"]),
        ),
    }
    for task in ("vqav2", "textvqa", "vizwiz"):
        theirs = [{"answer": text, "answer_id": i} for i, text in enumerate(ten)]
        own = BenchmarkQuestion("a", answers=ten, extra={"question_id": 1})
        documents[task] = ({"answers": theirs if task == "vqav2" else ten, "question_id": 1}, own)
    asked: list[dict[str, Any]] = [
        {"task": task, "doc": document, "answer": text}
        for task, (document, _) in documents.items()
        for text in SAID
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    out = environment.run("-c", SCORE, str(tmp_path / "asked.json"))
    theirs = json.loads(out.splitlines()[-1])
    different = set()
    for row, value in zip(asked, theirs, strict=True):
        given = GivenAnswer(documents[row["task"]][1], row["answer"])
        if row["task"] == "mme":  # MME counts pairs: the other question of the picture is right
            other = BenchmarkQuestion("b", answers=["No"], labels={"task": "existence"}, medium="a")
            measures = get_task("mme").measure([given, GivenAnswer(other, "no")])
            ours = 1.0 if measures[0].value == pytest.approx(200) else 0.0
        else:
            ours = get_task(row["task"]).measure([given])[0].value / 100
        if ours != pytest.approx(value):
            different.add((row["task"], row["answer"]))
    assert different == OTHERWISE


READ = """
import json, sys
from lm_eval.utils import make_table
print(make_table(json.load(open(sys.argv[1]))))
"""


def test_results_load_in_lm_evals_own_tooling(environment: Environment, tmp_path: Path) -> None:
    questions = [BenchmarkQuestion(f"q{i}", "?", answers=["yes"]) for i in range(4)]
    settings = {
        "task": "gqa",
        "split": "testdev",
        "prompt": "paper",
        "format": "raw",
        "as_reference": False,
        "model": "m",
        "questions": 4,
    }
    write_task(tmp_path / "gqa", settings, questions)
    with AnswerWriter(tmp_path / "gqa") as writer:
        said = ("yes", "Yes.", "no", "maybe")
        pairs = zip(questions, said, strict=True)
        writer.write(WrittenAnswer(q.id, q.text, text, 1, "eos") for q, text in pairs)
    write_scores(tmp_path, score_folder(tmp_path))
    table = environment.run("-c", READ, str(tmp_path / "results.json"))
    (line,) = (line for line in table.splitlines() if "gqa" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert {"gqa", "none", "accuracy"} <= set(cells) and float(cells[6]) == 50.0
    # the samples have the keys by which its tools read them
    for text in (tmp_path / "gqa" / "samples.jsonl").read_text().splitlines():
        assert {"doc_id", "doc", "target", "resps", "filtered_resps"} <= json.loads(text).keys()


def test_the_reader_of_media_takes_what_lmms_eval_gives(
    environment: Environment, tmp_path: Path
) -> None:
    code = (
        "import numpy as np; from PIL import Image;"
        "from onellm_dist.evaluation.lmms.media import read_medium;"
        "from onellm_dist.evaluation.lmms.model import LmmsModel, _cut, _list_ends;"
        f"picture = Image.new('RGBA', (40, 30), (200, 10, 10, 255)); path = {str(tmp_path)!r};"
        "picture.convert('RGB').save(path + '/a.png');"
        "(a,), (b,) = (list(read_medium('image', x)) for x in (picture, path + '/a.png'));"
        "assert a.key == b.key and (a.value == b.value).all();"
        "sound = {'array': np.sin(np.arange(8000) / 9), 'sampling_rate': 16000};"
        "(c,) = read_medium('audio', sound); assert c.modality == 'audio';"
        "assert _cut('a b###c', _list_ends('###')) == 'a b' and _list_ends(None) == []"
    )
    environment.run("-c", code)
