"""What a checkpoint is, in words."""

from __future__ import annotations

from collections import defaultdict

from onellm_dist.common.counts import format_count
from onellm_dist.convert.card import count_parameters_by_part
from onellm_dist.convert.checkpoint import KINDS, OpenedCheckpoint


def describe_checkpoint(opened: OpenedCheckpoint) -> list[str]:
    """Lines with format, parameters by part, dtypes, training state and keys that do not fit."""
    size = sum(path.stat().st_size for path in opened.files)
    lines = [
        f"format {opened.format}: {KINDS[opened.kind]}, "
        f"{format_count(len(opened.files), 'file')} of "
        f"{size / 1e9:.3f} GB"
    ]
    lines += [f"{key}: {value}" for key, value in opened.notes.items() if value is not None]
    if opened.kind == "onellm":
        config = opened.config
        lines.append(f"modalities: {', '.join(config.modalities)}")
        lines.append(
            f"UPM: {format_count(config.upm.experts, 'expert')} of "
            f"{format_count(config.upm.blocks, 'block')}, "
            f"router {config.upm.router}"
        )
        if config.span_positions != "none":
            lines.append(f"span positions: {config.span_positions}")
    dtypes: dict[str, set[str]] = defaultdict(set)
    for name, tensor in opened.tensors.items():
        part = name.split(".", 1)[0] if opened.kind == "onellm" else opened.kind
        dtypes[part].add(str(tensor.dtype).removeprefix("torch."))
    counts = count_parameters_by_part(opened)
    lines += [
        f"{part:<11} {count:>16,} parameters  {', '.join(sorted(dtypes[part]))}"
        for part, count in counts.items()
    ]
    lines.append(f"{'total':<11} {sum(counts.values()):>16,} parameters")
    if opened.ignored:
        dots = " ..." if len(opened.ignored) > 8 else ""
        shown = ", ".join(opened.ignored[:8])
        lines.append(f"{format_count(len(opened.ignored), 'key')} that nothing uses: {shown}{dots}")
    if opened.problems:
        lines.append(f"{format_count(len(opened.problems), 'key does', 'keys do')} not fit:")
        lines += [f"  - {problem}" for problem in opened.problems]
    else:
        lines.append("no part is missing")
    return lines
