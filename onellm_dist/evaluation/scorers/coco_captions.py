"""Captions as COCO's program scores them, through pycocoevalcap (extra `eval`).

Texts are split by Stanford's PTB tokenizer, which runs in Java. Without Java, or without the
package, nothing is computed: other tokens give other numbers. METEOR needs Java too, SPICE a file
that pycocoevalcap downloads; where that is not there, the report says "not computed".
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from onellm_dist.common.extras import get_install_command
from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.labels import collect_labels
from onellm_dist.evaluation.scorers.measure import Measure, compute_mean

ORDERS = 4
"""Longest n-grams of BLEU."""
Tokens = dict[str, list[str]]
"""Id -> its texts, split into tokens."""


class NotComputedError(Exception):
    """Why a score is missing; the argument says so."""


def tokenize(texts: Mapping[str, Sequence[str]]) -> Tokens:
    """Split texts as COCO's program does: PTB tokens in lower case, without punctuation.

    Raises:
        NotComputedError: pycocoevalcap or Java is missing.
    """
    if find_spec("pycocoevalcap") is None:
        raise NotComputedError(f"pycocoevalcap is not installed: {get_install_command('eval')}")
    java = shutil.which("java")
    if java is None:
        raise NotComputedError("there is no Java, which the PTB tokenizer needs")
    from pycocoevalcap.tokenizer import ptbtokenizer

    lines = [_flatten(text) for some in texts.values() for text in some]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    split = iter(_run_tokenizer(java, jar, lines))
    marks = set(ptbtokenizer.PUNCTUATIONS)
    return {
        key: [" ".join(w for w in next(split).split(" ") if w not in marks) for _ in some]
        for key, some in texts.items()
    }


def _run_tokenizer(java: str, jar: Path, lines: Sequence[str]) -> list[str]:
    """Run Stanford's tokenizer as pycocoevalcap does, but write nothing into its folder."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", str(file)]
        done = subprocess.run(command, capture_output=True, check=False)
    found = [line.rstrip() for line in done.stdout.decode("utf-8", "replace").split("\n")]
    if done.returncode or len(found) < len(lines):
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise NotComputedError(f"the PTB tokenizer failed: {' '.join(last)}")
    return found[: len(lines)]


def _flatten(text: str) -> str:
    """One line: the tokenizer works line by line, and Unicode has more ends of lines than two."""
    return " ".join(text.split())


def make_caption_measure(
    names: Sequence[str],
) -> Callable[[Sequence[GivenAnswer]], list[Measure]]:
    """Make a scorer of captions.

    Args:
        names: the measures, the most important first: BLEU-1 to BLEU-4, ROUGE-L, CIDEr, METEOR,
            SPICE, SPIDEr.
    """

    def measure(answers: Sequence[GivenAnswer]) -> list[Measure]:
        references, predictions = _tokenize_all(
            tuple((a.question.id, a.text, tuple(a.question.answers)) for a in answers)
        )
        return [
            make(answers, references, predictions)
            for name in names
            if (make := _find(name)) is not None
        ]

    return measure


def list_missing(names: Sequence[str]) -> dict[str, str]:
    """Measure -> why it cannot be computed here."""
    missing = {}
    for name in names:
        if name in ("SPICE", "SPIDEr") and not _has_spice():
            missing[name] = "SPICE's Java files are not there (pycocoevalcap downloads them)"
    return missing


@lru_cache(maxsize=4)
def _tokenize_all(
    given: tuple[tuple[str, str, tuple[str, ...]], ...],
) -> tuple[Tokens, Tokens]:
    both = tokenize({i: [*refs, text] for i, text, refs in given})  # Java starts once
    return {i: t[:-1] for i, t in both.items()}, {i: t[-1:] for i, t in both.items()}


def _has_spice() -> bool:
    spec = find_spec("pycocoevalcap")
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        return False
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) / "spice" / "lib"
    return any(folder.glob("stanford-corenlp-*-models.jar"))


def _find(name: str) -> Callable[..., Measure] | None:
    if name.startswith("BLEU-"):
        return lambda *given: _measure_bleu(name, int(name[-1]), *given)
    if name in ("SPICE", "SPIDEr") and not _has_spice():
        return None
    if name == "METEOR":
        return lambda *given: _measure_meteor(name, *given)
    scorer = {
        "ROUGE-L": _score_rouge,
        "CIDEr": _score_cider,
        "SPICE": _score_spice,
        "SPIDEr": _score_spider,
    }[name]
    return lambda *given: _measure_mean(name, scorer, *given)


def _measure_mean(
    name: str,
    score: Callable[[Tokens, Tokens], Sequence[float]],
    answers: Sequence[GivenAnswer],
    references: Tokens,
    predictions: Tokens,
) -> Measure:
    values = dict(zip(references, map(float, score(references, predictions)), strict=True))
    return Measure.from_values(name, values, collect_labels(answers), graded=True)


def _score_rouge(references: Tokens, predictions: Tokens) -> Sequence[float]:
    from pycocoevalcap.rouge.rouge import Rouge

    scores: Any = Rouge().compute_score(references, predictions)[1]
    return list(scores)


def _score_cider(references: Tokens, predictions: Tokens) -> Sequence[float]:
    """CIDEr-D; document frequencies are those of the references that are scored."""
    from pycocoevalcap.cider.cider import Cider

    scores: Any = Cider().compute_score(references, predictions)[1]
    return list(scores)


def _measure_meteor(
    name: str, answers: Sequence[GivenAnswer], references: Tokens, predictions: Tokens
) -> Measure:
    """METEOR of the whole set, which its program computes from counts that it sums over captions.

    The counts stay in that program, so draws and parts are means of the captions' own scores, in
    the ratio of the set's score to their mean.
    """
    whole, scores = _run_meteor(references, predictions)
    mean = _measure_mean(name, lambda *_: scores, answers, references, predictions)
    ratio = 100 * whole / mean.value if mean.value else 1.0
    return replace(mean, combine=lambda sums: ratio * compute_mean(sums))


def _run_meteor(references: Tokens, predictions: Tokens) -> tuple[float, Sequence[float]]:
    """METEOR of the whole set, and of each caption."""
    from pycocoevalcap.meteor.meteor import Meteor

    found: Any = Meteor().compute_score(references, predictions)
    return float(found[0]), list(found[1])


def _score_spice(references: Tokens, predictions: Tokens) -> Sequence[float]:
    from pycocoevalcap.spice.spice import Spice

    scores: Any = Spice().compute_score(references, predictions)[1]
    return [score["All"]["f"] for score in scores]


def _score_spider(references: Tokens, predictions: Tokens) -> Sequence[float]:
    """SPIDEr: the mean of CIDEr-D and SPICE."""
    pairs = zip(
        _score_cider(references, predictions), _score_spice(references, predictions), strict=True
    )
    return [(cider + spice) / 2 for cider, spice in pairs]


def _measure_bleu(
    name: str,
    order: int,
    answers: Sequence[GivenAnswer],
    references: Tokens,
    predictions: Tokens,
) -> Measure:
    """Corpus BLEU with the closest reference length, from sums over captions."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer: Any = BleuScorer(n=ORDERS)
    for key, refs in references.items():
        scorer += (predictions[key][0], refs)
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        reference = min((abs(n - length), n) for n in counts["reflen"])[1]
        rows.append([*counts["correct"][:order], *counts["guess"][:order], length, reference])
    return Measure(
        name,
        list(references),
        np.array(rows, dtype=np.float64),
        compute_bleu,
        collect_labels(answers),
    )


def compute_bleu(sums: np.ndarray) -> np.ndarray:
    """(correct and guessed n-grams, length, reference length) -> 100 * BLEU, as pycocoevalcap."""
    order = (sums.shape[-1] - 2) // 2
    correct, guessed = sums[..., :order] + 1e-15, sums[..., order : 2 * order] + 1e-9
    ratio = (sums[..., -2] + 1e-15) / (sums[..., -1] + 1e-9)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / np.maximum(ratio, 1e-12)), 1.0)
    score: np.ndarray = 100 * np.exp(np.log(correct / guessed).mean(-1)) * penalty
    return score
