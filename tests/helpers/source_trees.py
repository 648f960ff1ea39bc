"""Folders as the download tools leave them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import webdataset
from pyarrow import parquet


def write_download(
    root: Path,
    shard: int,
    rows: Sequence[Mapping[str, Any]],
    *,
    extension: str = "jpg",
    per_shard: int = 100,
    failures_in_tar: bool = False,
    finished: bool = True,
    captions: bool = True,
) -> Path:
    """Write one shard as img2dataset 1.47 does (`failures_in_tar`: as video2dataset does).

    Each row has its columns and `media`.

    Returns:
        The tar.
    """
    root.mkdir(parents=True, exist_ok=True)
    name, digits = f"{shard:05d}", math.ceil(math.log10(per_shard))
    metas = []
    with open(root / f"{name}.tar", "wb") as file:
        writer = webdataset.TarWriter(file)
        for number, row in enumerate(rows):
            key = f"{10**digits * shard + number:0{digits + 5}d}"
            meta = {
                **{k: v for k, v in row.items() if k != "media"},
                "key": key,
                "status": row.get("status", "success"),
                "error_message": row.get("error_message"),
                "width": row.get("width"),
                "height": row.get("height"),
            }
            metas.append(meta)
            if row.get("media") is not None or failures_in_tar:
                text = (
                    {"txt": str(row["caption"]) if row.get("caption") is not None else ""}
                    if captions
                    else {}
                )
                media = {extension: row["media"]} if row.get("media") is not None else {}
                writer.write({"__key__": key, **media, **text, "json": json.dumps(meta, indent=4)})
        writer.close()
    parquet.write_table(pyarrow.Table.from_pylist(metas), root / f"{name}.parquet")
    if finished:
        good = sum(m["status"] == "success" for m in metas)
        stats = {
            "count": len(metas),
            "successes": good,
            "failed_to_download": len(metas) - good,
            "failed_to_resize": 0,
            "duration": 1.0,
        }
        (root / f"{name}_stats.json").write_text(json.dumps(stats, indent=4))
    return root / f"{name}.tar"
