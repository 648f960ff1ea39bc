"""Samples per second and core from JPEG shards: our reader beside a bare loop and two peers.

    python benchmarks/loader.py                    # 2,000 JPEGs of 500 x 400, about a minute
    python benchmarks/loader.py --samples 500 --rounds 3

The peers are webdataset's pipeline and Energon's loader. Every contender reads the same shards in
one process with one thread, tokenizes the same captions and produces the same float tensors. The
bare loop is the limit: the fastest decoder and resize of the project over files in order, without
shards, plan, checksums or packing. Peers run twice: with their usual Pillow transform
(`torchvision.transforms`, what people write), and with our decoder and resize, so that only the
pipeline differs.

Our reader leaves the pixels as bytes, which the model normalises on its device. The bare loop and
the peers produce floats; "bare loop, bytes" does what ours does.

Contenders take turns in small rounds, timed by CPU time, and the median of the ratios to the bare
loop of the same round is printed, because cores may be shared. Limits: ours at least 0.95 of the
bare loop, and above both peers' own pipelines (the rows with Pillow). The rows with our decoder
show what plan, index, checksums and packing cost: those pipelines check no bytes and promise no
order.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

LIMIT = 0.95
WIDTH, HEIGHT, PER_SHARD, BATCH = 500, 400, 1000, 32
NAME = "image"


def main() -> int:
    """Print a table; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--batches", type=int, default=6, help=f"batches of {BATCH} samples per round"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_shards(root, arguments.samples)
        contenders = {
            "bare loop": run_bare_loop(root, transform_ours),
            "bare loop, bytes": run_bare_loop(root, crop_ours),
            "onellm_dist": run_ours(root),
            "webdataset, Pillow": run_webdataset(root, transform_theirs),
            "webdataset, our decoder": run_webdataset(root, transform_ours),
        }
        contenders |= run_energon(root)
        rates = measure(contenders, arguments.rounds, arguments.batches)
    return report(rates)


def measure(
    contenders: dict[str, Iterator[int]], rounds: int, batches: int
) -> dict[str, list[float]]:
    """Return each contender's samples per CPU second, round by round, after a warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.process_time()
            samples = sum(next(contenders[name]) for _ in range(batches))
            if number:
                rates[name].append(samples / (time.process_time() - started))
    return rates


def report(rates: dict[str, list[float]]) -> int:
    """Print the table; return 1 if a limit is missed."""
    bare_rates = rates["bare loop"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(own, bare_rates, strict=True))
        for name, own in rates.items()
    }
    print(f"{'':26} {'samples/s/core':>15} {'of the bare loop':>17}")
    for name, own in rates.items():
        print(f"{name:26} {statistics.median(own):15.0f} {ratios[name]:17.2f}")
    ours_ratio = ratios.pop("onellm_dist")
    ratios.pop("bare loop")
    ratios.pop("bare loop, bytes")
    peers = [ratio for name, ratio in ratios.items() if name.endswith("Pillow")]
    met = ours_ratio >= LIMIT and all(ours_ratio > ratio for ratio in peers)
    outcome = "met" if met else "MISSED"
    print(
        f"limits: ours >= {LIMIT} of the bare loop and above every peer's own pipeline: {outcome}"
    )
    return 0 if met else 1


def make_shards(root: Path, samples: int) -> None:
    """Write our dataset; its tars are plain WebDataset tars, which the peers can read."""
    from onellm_dist.shards.format.writer import DatasetWriter

    draw = np.random.default_rng(0)
    with DatasetWriter(root / NAME, name=NAME, modalities=(NAME,), max_samples=PER_SHARD) as writer:
        for number in range(samples):
            writer.add(
                "train",
                f"{number:06d}",
                {"jpg": make_jpeg(draw), "txt": make_caption(draw).encode()},
            )


def make_jpeg(draw: np.random.Generator) -> bytes:
    """Make a photo-like picture: smooth shapes, fine grain, quality 90, 4:2:0 (about 60 kB)."""
    rough = Image.fromarray(draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    grain = np.asarray(rough).astype(np.int16) + draw.integers(
        -12, 13, (HEIGHT, WIDTH, 1), dtype=np.int16
    )
    out = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_caption(draw: np.random.Generator) -> str:
    """Make a caption of 6 to 23 words."""
    words = [
        "a",
        "red",
        "blue",
        "green",
        "small",
        "large",
        "cube",
        "sphere",
        "cone",
        "left",
        "of",
        "above",
        "below",
        "the",
    ]
    return " ".join(words[i] for i in draw.integers(0, len(words), int(draw.integers(6, 24))))


def load_tokenizer() -> Any:
    """Load the toy tokenizer."""
    from transformers import AutoTokenizer

    import onellm_dist

    return AutoTokenizer.from_pretrained(
        Path(onellm_dist.__file__).parent / "model" / "assets" / "toy_tokenizer",
        trust_remote_code=False,
    )


def crop_ours(data: bytes) -> torch.Tensor:
    """Decode and crop at random with the project's fastest decoder and resize: bytes."""
    from onellm_dist.modalities.base import Part
    from onellm_dist.modalities.io.pictures import decode_picture
    from onellm_dist.modalities.transforms.crops import choose_crop_box, crop_train, split_channels

    picture = decode_picture(Part("jpg", data))
    return split_channels(crop_train(picture, choose_crop_box(*picture.size, DRAW)))


def transform_ours(data: bytes) -> torch.Tensor:
    """The pixels of `crop_ours`, normalised."""
    from onellm_dist.modalities.transforms.crops import normalise

    return normalise(crop_ours(data))


DRAW = np.random.default_rng(1)


def transform_theirs(data: bytes) -> torch.Tensor:
    """Decode and crop with Pillow and torchvision.transforms, as the reference does."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD

    global _THEIRS  # noqa: PLW0603
    if _THEIRS is None:
        crop = transforms.RandomResizedCrop(
            224, scale=(0.9, 1.0), ratio=(0.75, 1.3333), interpolation=InterpolationMode.BICUBIC
        )
        _THEIRS = transforms.Compose(
            [crop, transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
        )
    return _THEIRS(Image.open(io.BytesIO(data)).convert("RGB"))


_THEIRS: Callable[[Any], torch.Tensor] | None = None


def run_bare_loop(root: Path, pixels: Callable[[bytes], torch.Tensor]) -> Iterator[int]:
    """Read files in order, decode, resize, tokenize and stack: the limit."""
    from onellm_dist.data.text import TextEncoder
    from onellm_dist.modalities.base import Part
    from onellm_dist.shards.format.dataset import open_dataset
    from onellm_dist.shards.format.parts import read_parts

    encoder = TextEncoder(load_tokenizer(), "caption", 96)
    dataset = open_dataset(root / NAME)
    files: list[tuple[Path, bytes]] = []
    folder = root / "files"
    folder.mkdir(exist_ok=True)
    for shard in dataset.shards():
        for row in range(shard.samples):
            parts = read_parts(dataset, shard, row)
            path = folder / f"{len(files):06d}.jpg"
            path.write_bytes(parts["jpg"].data)
            files.append((path, parts["txt"].data))
    endless = itertools.cycle(files)
    while True:
        chosen = list(itertools.islice(endless, BATCH))
        torch.stack([pixels(path.read_bytes()) for path, _ in chosen])
        texts = [encoder.encode({"txt": Part("txt", text)}) for _, text in chosen]
        torch.tensor([token for ids, _ in texts for token in ids])
        yield len(chosen)


def run_ours(root: Path) -> Iterator[int]:
    """Read with plan, index, checksums, seeded augmentation and packing, without workers."""
    from onellm_dist.config.schema import DataSection, MixtureEntry
    from onellm_dist.data.loader import Loader
    from onellm_dist.data.plan import Plan

    mixture = (MixtureEntry(path=Path(NAME)),)
    budget = {"pack_llm_tokens": BATCH * 96, "pack_encoder_tokens": BATCH * 257}
    config = DataSection(root=root, mixture=mixture, global_batch=20 * BATCH, **budget)
    plan = Plan.open(config, load_tokenizer(), 0, (NAME,), show=False)
    with Loader(plan, 1, 0, 0, 10**9, 0, pin=False) as loader:
        for _, batch in loader:
            yield len(batch.sample_ids)


def run_webdataset(root: Path, pixels: Callable[[bytes], torch.Tensor]) -> Iterator[int]:
    """Read with webdataset: shuffled shards, a shuffle buffer, decode, batch, padded captions."""
    import webdataset as wds

    words = load_tokenizer()
    words.pad_token = words.pad_token or words.eos_token
    urls = sorted(str(path) for path in (root / NAME / "shards").glob("*.tar"))
    source = wds.WebDataset(
        urls, shardshuffle=len(urls), resampled=True, handler=wds.reraise_exception
    ).shuffle(1000, initial=100)
    loader = source.to_tuple("jpg", "txt").map_tuple(pixels, lambda text: text.decode())
    for images, texts in loader.batched(
        BATCH, collation_fn=lambda rows: tuple(zip(*rows, strict=True))
    ):
        torch.stack(list(images))
        words(list(texts), padding=True, truncation=True, max_length=96, return_tensors="pt")
        yield len(images)


def run_energon(root: Path) -> dict[str, Iterator[int]]:
    """Read with Energon's loader, if megatron-energon is installed, through its own metadata."""
    try:
        import megatron.energon as peer
    except ImportError:
        print("Energon's loader: skipped (pip install megatron-energon)", file=sys.stderr)
        return {}
    from onellm_dist.shards.format.energon import write_energon

    write_energon(root / NAME)
    return {
        "Energon, Pillow": _iterate_energon(peer, root / NAME, transform_theirs),
        "Energon, our decoder": _iterate_energon(peer, root / NAME, transform_ours),
    }


def _iterate_energon(
    peer: Any, folder: Path, pixels: Callable[[bytes], torch.Tensor]
) -> Iterator[int]:
    class Task(peer.DefaultTaskEncoder):  # type: ignore[misc]  # Energon has no types
        decoder = None  # bytes; they are decoded below, as for the others
        cookers = (peer.Cooker(peer.stateless(_return_unchanged)),)

    words = load_tokenizer()
    words.pad_token = words.pad_token or words.eos_token
    config = peer.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = peer.get_train_dataset(
        str(folder),
        worker_config=config,
        batch_size=None,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        task_encoder=Task(),
    )
    samples = iter(peer.get_loader(dataset))
    while True:
        chosen = list(itertools.islice(samples, BATCH))
        torch.stack([pixels(bytes(sample["jpg"])) for sample in chosen])
        texts = [bytes(sample["txt"]).decode() for sample in chosen]
        words(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
        yield len(chosen)


def _return_unchanged(sample: Any) -> Any:
    return sample


if __name__ == "__main__":
    sys.exit(main())
