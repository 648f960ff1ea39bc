"""Captions of a dataset's test splits, in batches: shards and a model in, JSON lines out.

    python -m onellm_dist.evaluation.captioning MODEL OUT.jsonl DATASET...
        [--splits test_seen,test_held_out] [--limit 120]

The default splits are those of the toy world. Decoding is greedy and ends at EOS or at the
reference's stop string. The output has one line per sample.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onellm_dist.common.errors import SampleError
from onellm_dist.common.progress import progress
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.data.text import (
    STOP,
    TextEncoder,
    render_answer_prefix,
    render_opening,
    render_turn,
)
from onellm_dist.data.text_parts import read_caption, read_meta, read_turns
from onellm_dist.evaluation.report import Caption
from onellm_dist.evaluation.toy_captions import SPLITS
from onellm_dist.modalities import Part, get_modality
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.tools.safe_decoding import map_rows

BATCH = 20
NEW_TOKENS = 24
"""Maximum length of a caption, in tokens."""
MAX_PROMPT_TOKENS = 4096


@dataclass(frozen=True)
class Question:
    """One sample of a test split."""

    key: str
    """Key of the sample."""
    prompt: str
    """All text before the answer, as training lays it out."""
    values: dict[str, torch.Tensor]
    """Modality to model input, fp32."""
    reference: str
    """The correct answer."""


def read_questions(
    dataset: Dataset, split: str, limit: int | None = None, *, ask: bool = True
) -> Generator[Question]:
    """Read the samples of a split with the evaluation transforms, each within its limits.

    Args:
        dataset: the dataset.
        split: its split.
        limit: maximum number of samples; default: all.
        ask: whether to ask the sample's question in the conversation format; False leaves the
            prompt empty, which asks for the caption.

    Raises:
        SampleError: a sample cannot be read, or not within the limits of a sample; a test set
            must be complete.
    """
    rows = [(shard, row) for shard in dataset.shards(split) for row in range(shard.samples)]

    def read(dataset: Dataset, shard: ShardInfo, row: int) -> Question:
        return _read_question(dataset, shard, row, ask=ask)

    wanted = rows if limit is None else rows[: max(0, limit)]
    yield from map_rows(dataset, wanted, read, _refuse)


def _read_question(dataset: Dataset, shard: ShardInfo, row: int, *, ask: bool) -> Question:
    parts = read_parts(dataset, shard, row)
    meta = read_meta(parts)
    values = {}
    for modality in map(get_modality, dataset.modalities):
        media = {role: parts[extension] for role, extension in modality.match(parts).items()}
        rng = np.random.default_rng(0)
        with decoding():
            values[modality.name] = modality.read_value(media, meta, train=False, rng=rng)
    prompt, reference = _build_exchange(parts) if ask else ("", read_caption(parts))
    return Question(dataset.index(shard).key(row), prompt, values, reference)


def _refuse(dataset: Dataset, shard: ShardInfo, row: int, reason: str) -> Question:
    key = dataset.index(shard).key(row)
    raise SampleError(f"{dataset.name}/{shard.name}/{key}: its decoder failed: {reason}")


def _build_exchange(parts: dict[str, Part]) -> tuple[str, str]:
    """Return the text up to the first answer, and that answer."""
    text, turns = render_opening(read_turns(parts))
    for turn in turns:
        if turn.role == "assistant":
            return text + render_answer_prefix(), turn.text
        text += render_turn(turn)
    raise AssertionError("read_turns refuses conversations without an answer")


@torch.inference_mode()
def generate_answers(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Answer questions with the same prompt and the same modalities greedily, as one batch."""
    encoder = TextEncoder(tokenizer, "caption", MAX_PROMPT_TOKENS)
    ids, _ = encoder.encode({"txt": Part("txt", questions[0].prompt.encode())})
    ids = ids[:-1]  # without the EOS of a caption
    prompt = torch.tensor([ids] * len(questions), device=model.device)
    values = {
        f"{name}_values": torch.stack([q.values[name] for q in questions]).to(model.device)
        for name in questions[0].values
    }
    eos = tokenizer.eos_token_id
    out = model.generate(
        prompt,
        torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=[eos, *_get_stop_ids(tokenizer)],
        pad_token_id=eos,
        **values,
    )
    texts = tokenizer.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)
    return [text.split(STOP)[0].strip() for text in texts]


def _get_stop_ids(tokenizer: Any) -> list[int]:
    """Return the stop string's token, if it is one token where training supervises it.

    That is after a line break.
    """
    ids = tokenizer(f"\n{STOP}", add_special_tokens=False).input_ids
    last = tokenizer.decode(ids[-1:])
    return [ids[-1]] if last.strip() == STOP else []


def caption_split(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    split: str,
    *,
    limit: int | None = None,
    ask: bool = True,
    batch: int = BATCH,
    new_tokens: int = NEW_TOKENS,
) -> Generator[Caption]:
    """Caption the samples of a split, in its order.

    Args:
        model: a OneLLMForConditionalGeneration.
        tokenizer: its tokenizer.
        dataset: the dataset.
        split: its split.
        limit: maximum number of samples; default: all.
        ask: see `read_questions`.
        batch: samples per batch.
        new_tokens: maximum length of a caption, in tokens.
    """
    name = "+".join(dataset.modalities)
    waiting: list[Question] = []

    def flush() -> Iterator[Caption]:
        for _, group in groupby(waiting, key=lambda q: q.prompt):
            questions = list(group)
            answers = generate_answers(model, tokenizer, questions, new_tokens=new_tokens)
            for question, answer in zip(questions, answers, strict=True):
                yield Caption(question.key, name, split, question.reference, answer)
        waiting.clear()

    with closing(read_questions(dataset, split, limit, ask=ask)) as questions:
        for question in questions:
            waiting.append(question)
            if len(waiting) == batch:
                yield from flush()
    yield from flush()


def caption_datasets(
    model_path: Path,
    datasets: Sequence[Path],
    out: Path,
    *,
    splits: Sequence[str],
    limit: int | None = None,
    ask: bool = True,
    new_tokens: int = NEW_TOKENS,
    follow_links: bool = False,
) -> None:
    """Caption splits of datasets with a saved model, and write one JSON line per sample.

    Args:
        model_path: directory of the saved model.
        datasets: folders of the datasets.
        out: the file to write.
        splits: the splits to caption; every dataset must have them.
        limit: maximum number of samples per split; default: all.
        ask: see `read_questions`.
        new_tokens: maximum length of a caption, in tokens.
        follow_links: whether files of the datasets may be links that lead out of their folders.

    Raises:
        UsageError: the model, a dataset or a split does not exist.
    """
    from onellm_dist.model.presets import load_model

    opened = [open_dataset(path, follow_links=follow_links) for path in datasets]
    total = sum(min(d.samples(s), limit or d.samples(s)) for d in opened for s in splits)
    loaded, processor = load_model(path=model_path, preset=None, seed=0)
    model: Any = loaded
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    with (
        progress(total, "Captioning", unit="samples") as bar,
        out.open("w", encoding="utf-8") as file,
    ):
        for dataset in opened:
            bar.note("+".join(dataset.modalities))
            for split in splits:
                found = caption_split(
                    model,
                    processor.tokenizer,
                    dataset,
                    split,
                    limit=limit,
                    ask=ask,
                    new_tokens=new_tokens,
                )
                with closing(found) as captions:
                    for caption in captions:
                        file.write(json.dumps(asdict(caption)) + "\n")
                        file.flush()
                        bar.advance()


def read_captions(path: Path) -> list[Caption]:
    """Read the file that `caption_datasets` wrote."""
    return [Caption(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line that the module's docstring shows."""
    parser = argparse.ArgumentParser(
        prog="python -m onellm_dist.evaluation.captioning",
        description=__doc__.splitlines()[0] if __doc__ else "",
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--splits", default=",".join(SPLITS), help="separated by commas")
    parser.add_argument("--limit", type=int, default=None, help="maximum samples per split")
    parser.add_argument(
        "--no-question",
        action="store_true",
        help="leave the prompt empty to ask for the caption, as align trains it",
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="also read tars that are links out of their dataset's folder",
    )
    given = parser.parse_args(arguments)
    caption_datasets(
        given.model,
        given.datasets,
        given.out,
        splits=given.splits.split(","),
        limit=given.limit,
        ask=not given.no_question,
        follow_links=given.follow_links,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
