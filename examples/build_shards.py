"""Build a dataset from a folder of pictures with captions, and read it back.

    python examples/build_shards.py photos shards_of_photos

Each picture `photos/NAME.jpg` has its caption in `photos/NAME.txt`. Samples that cannot be used are
left out, each with its reason in `shards_of_photos/quarantine.jsonl`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from onellm_dist import build_dataset, open_dataset


def main(inputs: Path, output: Path) -> None:
    """Build `output` from `inputs`, and print what it holds."""
    build_dataset("folder", inputs, output, options={"modality": "image"}, workers=2)
    dataset = open_dataset(output)
    print(f"{dataset.name}: {dataset.samples('train')} samples of {', '.join(dataset.modalities)}")
    for shard in dataset.shards("train"):
        index = dataset.index(shard)
        print(f"  {shard.path}: {', '.join(index.key(row) for row in range(shard.samples))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
