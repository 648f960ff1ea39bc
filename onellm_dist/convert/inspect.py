"""`onellm convert inspect X`: what a checkpoint is."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED
from onellm_dist.convert.card import parameters_by_part
from onellm_dist.convert.checkpoint import KINDS, Opened, Options
from onellm_dist.convert.registry import format_of, recognised


def opened_any(path: Path, options: Options, format_name: str | None = None) -> Opened:
    """A checkpoint of any format, recognised where none is named; what does not fit is kept in its `problems`."""
    opened: Opened = format_of(format_name or recognised(path)).open_checkpoint(path, options)
    return opened


def described(opened: Opened) -> list[str]:
    """Lines that say what it is."""
    size = sum(path.stat().st_size for path in opened.files)
    lines = [
        f"format {opened.format}: {KINDS[opened.kind]}, {len(opened.files)} files of {size / 1e9:.3f} GB"
    ]
    lines += [f"{key}: {value}" for key, value in opened.notes.items() if value is not None]
    if opened.kind == "onellm":
        config = opened.config
        lines.append(f"modalities: {', '.join(config.modalities)}")
        lines.append(
            f"UPM: {config.upm.experts} experts of {config.upm.blocks} blocks, router {config.upm.router}"
        )
    dtypes: dict[str, set[str]] = defaultdict(set)
    for name, tensor in opened.tensors.items():
        part = name.split(".", 1)[0] if opened.kind == "onellm" else opened.kind
        dtypes[part].add(str(tensor.dtype).removeprefix("torch."))
    counts = parameters_by_part(opened)
    lines += [
        f"{part:<11} {count:>16,} parameters  {', '.join(sorted(dtypes[part]))}"
        for part, count in counts.items()
    ]
    lines.append(f"{'total':<11} {sum(counts.values()):>16,} parameters")
    if opened.ignored:
        lines.append(
            f"{len(opened.ignored)} keys that nothing uses: {', '.join(opened.ignored[:8])}{' ...' if len(opened.ignored) > 8 else ''}"
        )
    if opened.problems:
        lines += [
            f"{len(opened.problems)} keys do not fit:",
            *(f"  - {problem}" for problem in opened.problems),
        ]
    else:
        lines.append("no part is missing")
    return lines


def inspect_command(path: Path, options: Options, format_name: str | None) -> int:
    """Prints it. Returns the exit code: 1 where something is missing."""
    opened = opened_any(path, options, format_name)
    print("\n".join([f"{path}", *described(opened)]))
    return EXIT_FAILED if opened.problems else EXIT_DONE
