"""From shards to packs: caption lists, chat templates, text alone, audio with video."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from data_worlds import open_plan, png, section, tokenizer
from transformers import PreTrainedTokenizerFast

from onellm_dist.common.errors import OneLLMError
from onellm_dist.data.captions import choose_captions
from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.shards.format.writer import DatasetWriter

MODALITIES = ("image", "video", "audio")
CAPTIONS = 3


def clip(number: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(16):
            frame = np.full((48, 64, 3), (i * 16 + number * 40) % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return out.getvalue()


def tone(number: int) -> bytes:
    out = io.BytesIO()
    wave = 0.3 * np.sin(2 * np.pi * (300 + 90 * number) * np.arange(8000) / 16000)
    soundfile.write(out, wave.astype(np.float32), 16000, format="WAV")
    return out.getvalue()


def captions(number: int) -> list[str]:
    """One caption for every fourth sample, else three of different lengths."""
    words = [" ".join(["a red cube"] * (1 + (number + k) % 5)) for k in range(CAPTIONS)]
    return words[:1] if number % 4 == 0 else words


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    with DatasetWriter(root / "many", name="many", modalities=("image",), max_samples=6) as writer:
        for number in range(16):
            meta = {"caption": captions(number)}
            writer.add(
                "train",
                f"m{number:02d}",
                {"png": png(np.random.default_rng(number)), "json": json.dumps(meta).encode()},
            )
    with DatasetWriter(
        root / "heard", name="heard", modalities=("video", "audio"), max_samples=4
    ) as writer:
        for number in range(4):
            turns = [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image>\nwhat is seen and heard"},
                {"from": "gpt", "value": f"a bar and tone {number}"},
                {"from": "human", "value": "which tone"},
                {"from": "gpt", "value": str(number)},
            ]
            parts = {
                "mp4": clip(number),
                "wav": tone(number),
                "json": json.dumps({"conversations": turns}).encode(),
            }
            writer.add("train", f"h{number}", parts)
    with DatasetWriter(root / "talk", name="talk", modalities=(), max_samples=8) as writer:
        for number in range(8):
            turns = [
                {"from": "human", "value": f"question {number}"},
                {"from": "gpt", "value": "yes " * (number + 1)},
            ]
            writer.add(
                "train", f"t{number}", {"json": json.dumps({"conversations": turns}).encode()}
            )
    return root


def texts(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    lengths = list(batch.text_token_counts)
    return [
        (i.tolist(), t.tolist())
        for i, t in zip(batch.input_ids.split(lengths), batch.labels.split(lengths), strict=True)
    ]


def read(
    plan: Plan, steps: Sequence[int], world_size: int = 1, workers: int = 0
) -> dict[str, tuple[list[int], list[int]]]:
    """Sample id (with its epoch) to ids and labels, read by a loader."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for rank in range(world_size):
        with Loader(plan, world_size, rank, steps[0], steps[-1] + 1, workers) as loader:
            for _, batch in loader:
                assert not batch.skipped_samples
                found.update(
                    zip(batch.sample_ids, texts(batch), strict=True) if not batch.is_empty else []
                )
    return found


def test_captions_are_chosen_evenly_and_by_sample_and_epoch_alone() -> None:
    rows, epochs = np.repeat(np.arange(50), 60), np.tile(np.arange(60), 50)
    chosen = choose_captions(0, "d", "s", rows, epochs, np.full(3000, 3))
    assert [900 < count < 1100 for count in np.bincount(chosen)] == [True] * 3
    one = choose_captions(0, "d", "s", rows[77:78], epochs[77:78], np.asarray([3]))
    assert one.tolist() == chosen[77:78].tolist()
    for seed, dataset, shard in ((1, "d", "s"), (0, "e", "s"), (0, "d", "t")):
        assert (
            0.2
            < (
                choose_captions(seed, dataset, shard, rows, epochs, np.full(3000, 3)) == chosen
            ).mean()
            < 0.5
        )
    assert not choose_captions(0, "d", "s", rows, epochs, np.ones(3000, dtype=np.int64)).any()


@pytest.mark.seconds
def test_of_several_captions_every_epoch_takes_one_and_the_plan_knows_its_length(
    root: Path,
) -> None:
    """16 samples, 8 epochs: the reader checks lengths, so each text read is the one planned."""
    plan = open_plan(root, {"many": 1}, modalities=MODALITIES, global_batch=16, augment=False)
    once = read(plan, range(8))
    assert len(once) == 16 * 8
    said = {name: tokenizer().decode(ids[1:-1]) for name, (ids, _) in once.items()}
    by_sample: dict[int, Counter[str]] = {}
    for name, text in said.items():
        number = int(name.partition("@")[0][-2:])
        assert text in captions(number)
        by_sample.setdefault(number, Counter())[text] += 1
    assert all(len(by_sample[number]) == 1 for number in range(0, 16, 4))
    assert sum(len(by_sample[number]) for number in range(16) if number % 4) > 24, (
        "most samples showed two or three of their captions"
    )
    for ids, labels in once.values():
        assert labels == [IGNORE, *ids[1:]]
    global_valid_tokens = sum(
        label != IGNORE
        for name, (_, labels) in once.items()
        if name.endswith("@3")
        for label in labels
    )
    assert plan.step(3, 1).global_valid_tokens == global_valid_tokens

    again = open_plan(root, {"many": 1}, modalities=MODALITIES, global_batch=16, augment=False)
    assert read(again, range(2), world_size=3, workers=1) == {
        name: found for name, found in once.items() if name.endswith(("@0", "@1"))
    }


def test_counts_of_several_captions_of_another_shard_are_named(root: Path) -> None:
    plan = open_plan(root, {"many": 1}, modalities=MODALITIES, global_batch=16)
    path = next(
        p for p in (root / "many" / "token_counts").glob("*/*.npy") if np.load(p).shape[1] == 3
    )
    whole = path.read_bytes()
    try:
        np.save(path, np.load(path)[1:])
        with pytest.raises(OneLLMError, match="does not belong to this shard"):
            plan.samples(0)
    finally:
        path.write_bytes(whole)


def chatty() -> Any:
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tok.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tok


@pytest.mark.parametrize("text_format", ["conversation", "chat"])
def test_joint_media_and_text_alone_share_packs_and_every_answer_is_supervised(
    root: Path, text_format: str
) -> None:
    tok = chatty()
    data = section(
        root,
        {"heard": 1, "talk": 1},
        text_format=text_format,
        max_text_tokens=2018,
        global_batch=8,
        pack_llm_tokens=4096,
        pack_encoder_tokens=32768,
    )
    plan = Plan.open(data, tok, 0, MODALITIES, show=False)
    (micro,) = plan.step(0, 1).ranks[0]
    batch = Reader(plan.corpus).read(micro)
    assert Counter(batch.modalities) == {("video", "audio"): 4, (): 4}
    assert {name: len(value) for name, value in batch.values.items()} == {
        "image": 0,
        "video": 4,
        "audio": 4,
    }
    assert all(
        torch.isfinite(value).all() and (value.std() > 0 if len(value) else True)
        for value in batch.values.values()
    )
    end = "</s>" if text_format == "chat" else "\n###"
    space = "" if text_format == "chat" else " "
    for name, (ids, labels) in zip(batch.sample_ids, texts(batch), strict=True):
        number = int(name.partition("@")[0][-1])
        answers = (
            [f"a bar and tone {number}", str(number)]
            if name.startswith("heard/")
            else ["yes " * (number + 1)]
        )
        kept = tok.decode(
            [label for label in labels if label != IGNORE], clean_up_tokenization_spaces=False
        )
        assert kept == "".join(f"{space}{answer}{end}" for answer in answers)
        assert ids[0] == tok.bos_token_id
        assert ("Be brief." in tok.decode(ids)) == name.startswith("heard/")
    assert plan.step(0, 1).global_valid_tokens == int((batch.labels != IGNORE).sum())
