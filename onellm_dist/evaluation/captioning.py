"""Captions of a dataset's test splits, in batches: shards and a model in, one JSON line a sample out.

    python -m onellm_dist.evaluation.captioning MODEL OUT.jsonl DATASET... [--splits test_seen,test_held_out] [--limit 120]

The question is the one in the sample's conversation; decoding is greedy and ends at EOS or at the reference's stop string.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onellm_dist.common.progress import progress
from onellm_dist.data.text import (
    STOP,
    TextEncoder,
    render_answer_prefix,
    render_opening,
    render_turn,
)
from onellm_dist.data.text_parts import read_caption, read_meta, read_turns
from onellm_dist.evaluation.report import Caption
from onellm_dist.modalities import Part, get_modality
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.index import read_parts

BATCH = 20
NEW_TOKENS = 24
LONGEST_PROMPT = 4096


@dataclass(frozen=True)
class Question:
    """One sample of a test split.

    Attributes:
        prompt: all text before the answer, as training lays it out.
        values: modality -> model input, fp32.
        reference: the right answer.
    """

    key: str
    prompt: str
    values: dict[str, torch.Tensor]
    reference: str


def questions(
    dataset: Dataset, split: str, limit: int | None = None, *, ask: bool = True
) -> Iterator[Question]:
    """The samples of a split, with evaluation transforms.

    Args:
        limit: most samples.
        ask: pose the sample's question in the conversation format; false: an empty prompt, which asks for the caption.

    Raises:
        SampleError: a sample cannot be read (a test set has no sample to spare).
    """
    kinds = [get_modality(name) for name in dataset.modalities]
    rows = ((shard, row) for shard in dataset.shards(split) for row in range(shard.samples))
    for number, (shard, row) in enumerate(rows):
        if limit is not None and number >= limit:
            return
        parts = read_parts(dataset, shard, row)
        meta = read_meta(parts)
        values = {}
        for kind in kinds:
            raw = kind.decode(
                {slot: parts[extension] for slot, extension in kind.match(parts).items()}, meta
            )
            values[kind.name] = kind.transform(raw, train=False, rng=np.random.default_rng(0))
        prompt, reference = _first_exchange(parts) if ask else ("", read_caption(parts))
        yield Question(dataset.index(shard).key(row), prompt, values, reference)


def _first_exchange(parts: dict[str, Part]) -> tuple[str, str]:
    """The text up to the first answer, and that answer."""
    text, turns = render_opening(read_turns(parts))
    for turn in turns:
        if turn.role == "assistant":
            return text + render_answer_prefix(), turn.text
        text += render_turn(turn)
    raise AssertionError("read_turns refuses conversations without an answer")


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, asked: Sequence[Question]) -> list[str]:
    """Greedy answers to questions that have the same prompt and the same modalities, as one batch."""
    encoder = TextEncoder(tokenizer, "caption", LONGEST_PROMPT)
    ids, _ = encoder.encode({"txt": Part("txt", asked[0].prompt.encode())})
    prompt = torch.tensor(
        [ids[:-1]] * len(asked), device=model.device
    )  # without the EOS of a caption
    values = {
        f"{name}_values": torch.stack([q.values[name] for q in asked]).to(model.device)
        for name in asked[0].values
    }
    eos = tokenizer.eos_token_id
    stop = _stop_ids(tokenizer)
    out = model.generate(
        prompt,
        torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=[eos, *stop],
        pad_token_id=eos,
        **values,
    )
    said = tokenizer.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)
    return [text.split(STOP)[0].strip() for text in said]


def _stop_ids(tokenizer: Any) -> list[int]:
    """The stop string's token, where it is one in the place that training supervises (after a line break)."""
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
) -> Iterator[Caption]:
    """Answers for a split, in its order."""
    name = "+".join(dataset.modalities)
    waiting: list[Question] = []

    def flush() -> Iterator[Caption]:
        for _, group in groupby(waiting, key=lambda q: q.prompt):
            same = list(group)
            for question, said in zip(same, answer(model, tokenizer, same), strict=True):
                yield Caption(question.key, name, split, question.reference, said)
        waiting.clear()

    for question in questions(dataset, split, limit, ask=ask):
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
) -> None:
    """Caption splits of datasets with a saved model, a JSON line a sample.

    Raises:
        UsageError: no model, no dataset, or a dataset without one of the splits.
    """
    from onellm_dist.model.presets import load_model

    opened = [open_dataset(path) for path in datasets]
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
                for caption in caption_split(
                    model, processor.tokenizer, dataset, split, limit=limit, ask=ask
                ):
                    file.write(json.dumps(asdict(caption)) + "\n")
                    file.flush()
                    bar.advance()


def read_captions(path: Path) -> list[Caption]:
    """What `caption_datasets` wrote."""
    return [Caption(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        prog="python -m onellm_dist.evaluation.captioning",
        description=__doc__.splitlines()[0] if __doc__ else "",
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--splits", default="test_seen,test_held_out")
    parser.add_argument("--limit", type=int, default=None, help="samples of a split")
    parser.add_argument(
        "--no-question",
        action="store_true",
        help="empty prompt: ask for the caption, as align trains it",
    )
    given = parser.parse_args(arguments)
    caption_datasets(
        given.model,
        given.datasets,
        given.out,
        splits=given.splits.split(","),
        limit=given.limit,
        ask=not given.no_question,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
