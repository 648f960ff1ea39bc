"""`onellm samples`: which samples a step had, at which steps a sample comes, what became of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.train.sample_log.lookup import Became, RunRecord, RunStream, Use


def samples_command(run_dir: Path, step: int | None, key: str | None, *, as_json: bool) -> int:
    """Prints the answer; a summary of the run where neither a step nor a sample is asked for.

    Raises:
        UsageError: both are, the directory is no run's, or there is no such step or sample.
    """
    if step is not None and key is not None:
        raise UsageError(
            "--step and --sample were both given", "they are two questions.", "give one of them."
        )
    stream, record = RunStream(run_dir), RunRecord(run_dir)
    if step is not None:
        answer, text = _of_step(stream, record, step)
    elif key is not None:
        answer, text = _of_sample(stream, record, key)
    else:
        answer, text = _summary(stream, record)
    print(json.dumps(answer, ensure_ascii=False) if as_json else "\n".join(text))
    return EXIT_DONE


def _of_step(stream: RunStream, record: RunRecord, step: int) -> tuple[dict[str, Any], list[str]]:
    uses = stream.samples(step)
    became = record.of(step)
    rows: list[dict[str, Any]] = [
        {
            "id": use.sample_id,
            "dataset": use.sample.dataset,
            "shard": use.sample.shard_name,
            "key": use.sample.key,
            "epoch": use.epoch,
            "modalities": list(stream.modalities(use.sample.dataset)),
            "skipped_sample": record.skipped_samples.get(use.sample_id),
        }
        for use in uses
    ]
    answer = {
        "step": step,
        **became._asdict(),
        "progress": record.progress,
        "sample_digest": _digest(uses),
        "samples": rows,
    }
    by_dataset = Counter(use.sample.dataset for use in uses)
    text = [
        f"step {step}: {_state(became)}; {len(uses)} samples ({', '.join(f'{n} {name}' for name, n in by_dataset.items())})",
        f"sample_digest {answer['sample_digest']}",
    ]
    text += [
        f"  {row['id']}  {_kind(row['modalities'])}{_skipped_sample(row['skipped_sample'])}"
        for row in rows
    ]
    return answer, text


def _of_sample(stream: RunStream, record: RunRecord, key: str) -> tuple[dict[str, Any], list[str]]:
    epoch = re.search(r"@(\d+)$", key)
    sample = stream.find(key[: epoch.start()] if epoch else key)
    uses = [
        use for use in stream.steps_of(sample) if epoch is None or use.epoch == int(epoch.group(1))
    ]
    rows: list[dict[str, Any]] = [
        {
            "step": use.step,
            "epoch": use.epoch,
            **record.of(use.step)._asdict(),
            "skipped_sample": record.skipped_samples.get(use.sample_id),
        }
        for use in uses
    ]
    kinds = stream.modalities(sample.dataset)
    answer = {
        "sample": sample.name,
        "dataset": sample.dataset,
        "shard": sample.shard_name,
        "key": sample.key,
        "modalities": list(kinds),
        "progress": record.progress,
        "seen": rows,
    }
    done = sum(use.step < record.progress for use in uses)
    text = [
        f"{sample.name} ({_kind(kinds)}): seen {done} times, {len(uses) - done} still to come (of {stream.steps} steps)"
    ]
    text += [
        f"  step {use.step}  epoch {use.epoch}  {_state(record.of(use.step))}{_skipped_sample(row['skipped_sample'])}"
        for use, row in zip(uses, rows, strict=True)
    ]
    return answer, text


def _summary(stream: RunStream, record: RunRecord) -> tuple[dict[str, Any], list[str]]:
    lost = sum(end - first for first, end in record.lost)
    answer = {
        "steps": stream.steps,
        "progress": record.progress,
        "saved": record.saved,
        "skipped": sorted(record.skipped),
        "lost_steps": lost,
        "skipped_samples": len(record.skipped_samples),
        "datasets": stream.names,
    }
    text = [
        f"{record.progress} of {stream.steps} steps done, {record.saved} of them in a checkpoint",
        f"{len(record.skipped)} skipped, {lost} lost to restarts and done again, {len(record.skipped_samples)} skipped_samples",
        f"datasets: {', '.join(stream.names)}",
    ]
    return answer, text


def _digest(uses: list[Use]) -> str:
    """`sample_digest` of metrics.jsonl."""
    ids = sorted(use.sample_id.encode("utf-8") for use in uses)
    return hashlib.sha256(b"".join(name + b"\n" for name in ids)).hexdigest()


def _state(became: Became) -> str:
    text = {"trained": "trained", "skipped": "skipped (not applied)", "planned": "still to come"}[
        became.state
    ]
    if became.state != "planned" and not became.saved:
        text += ", in no checkpoint yet"
    if became.lost:
        text += f", done {became.lost} time{'s' if became.lost > 1 else ''} before and lost to a restart"
    return text


def _kind(modalities: tuple[str, ...] | list[str]) -> str:
    return "+".join(modalities) or "text"


def _skipped_sample(reason: str | None) -> str:
    return "" if reason is None else f"  TOMBSTONE: {reason}"
